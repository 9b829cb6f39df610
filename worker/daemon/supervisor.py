"""Starts one Celery child per GPU, starts dead ones again after growing pauses, gives hopeless ones up, ends them.

Never imports torch: a parent that touched CUDA would spoil its children's pinning.
"""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from keye.worker.daemon.endpoint import environment_of
from keye.worker.daemon.exit_codes import ExitCode, describe
from keye.worker.telemetry.health import HEARTBEAT_VARIABLE, Health, HostFolder

TICK_SECONDS = 0.2
# After the drain a child still has to put its threads to rest and close its connections.
KILL_MARGIN_SECONDS = 10.0

logger = logging.getLogger(__name__)

# Long enough that a child which dies of its load (a poison job, memory that fills) still meets growing pauses.
STEADY_SECONDS = 60.0
MAX_PAUSE_SECONDS = 60.0
MAX_DEATHS_BEFORE_READY = 5


@dataclass(slots=True)
class Child:
    """One pinned worker process; times are `time.monotonic`.

    `deaths` is how often it died in a row, `deaths_before_ready` how often of these before it was ever ready. One that
    is given up is not started again.
    """

    gpu: str | None
    index: int
    starts: int = 0
    deaths: int = 0
    deaths_before_ready: int = 0
    is_given_up: bool = False
    process: subprocess.Popen[bytes] | None = None
    start_at: float = 0.0
    started_at: float = 0.0
    ready_at: float | None = None

    @property
    def name(self) -> str:
        return "cpu" if self.gpu is None else f"gpu{self.index}"

    def __str__(self) -> str:
        return "worker on the CPU" if self.gpu is None else f"worker on GPU {self.gpu}"

    def pause_after_death(self, ready_seconds: float | None) -> float | None:
        """Seconds to wait before the next start (1, 2, 4 .. 60), or None to give up.

        `ready_seconds` is how long this run had been ready for, None if it never was. A run that was ready for
        `STEADY_SECONDS` clears the history.
        """
        if ready_seconds is None:
            self.deaths_before_ready += 1
            if self.deaths_before_ready >= MAX_DEATHS_BEFORE_READY:
                return None
        else:
            self.deaths_before_ready = 0
            if ready_seconds >= STEADY_SECONDS:
                self.deaths = 0
        self.deaths += 1
        return min(2.0 ** (self.deaths - 1), MAX_PAUSE_SECONDS)

    def start(self, host_workers: int, folder: HostFolder) -> None:
        # In place before anything imports torch. A pinned child must not fall back to the CPU in silence.
        told = {"CUDA_VISIBLE_DEVICES": self.gpu or "", "KEYE_DEVICE": "cpu" if self.gpu is None else "cuda"}
        told["KEYE_HOST_WORKERS"] = str(host_workers)
        folder.forget(self.name)
        told[HEARTBEAT_VARIABLE] = str(folder.heartbeat_of(self.name))
        told |= environment_of(self.name, folder.metrics)
        # -P: no module of the working directory stands in for one of ours, or of the standard library.
        command = [sys.executable, "-P", "-m", "keye.worker.daemon.child", str(os.getpid())]
        command += ["--hostname", f"keye-{self.name}-{os.getpid()}@%h"]
        # A process group of its own: Ctrl-C in a terminal is for us, and we tell the children in our own time.
        self.process = subprocess.Popen(command, env=os.environ | told, stdin=subprocess.DEVNULL, process_group=0)
        self.starts += 1
        self.started_at = time.monotonic()
        self.ready_at = None
        logger.info("%s is starting (pid %d)", self, self.process.pid)


class Supervisor:
    """`run` blocks until the first SIGTERM or SIGINT has drained every child, or until all are given up."""

    def __init__(self, folder: HostFolder, gpus: Sequence[str], drain_seconds: float, host_workers: int = 1) -> None:
        """`host_workers` is how many workers of this host divide its cores and memory, others' too."""
        self._folder = folder
        self._drain_seconds = drain_seconds
        self._host_workers = host_workers
        self._children = [Child(gpu, index) for index, gpu in enumerate(gpus)] or [Child(None, 0)]

    def run(self) -> ExitCode:
        with _recorded_signals() as signals:
            while not _arrived(signals):
                for child in self._children:
                    self._keep_alive(child)
                self._tell(is_draining=False)
                if all(child.is_given_up for child in self._children):
                    return self._drain(signals, ExitCode.CHILD_NEVER_READY)
            return self._drain(signals, ExitCode.OK)

    def _keep_alive(self, child: Child) -> None:
        """Start, watch, revive or give up one child."""
        now = time.monotonic()
        if child.process is None:
            if now >= child.start_at and not child.is_given_up:
                child.start(self._host_workers, self._folder)
        elif child.process.poll() is not None:
            self._plan_revival(child, child.process, now)
        elif child.ready_at is None and self._folder.health_of(child.name) is Health.READY:
            child.ready_at = now
            logger.info("%s (pid %d) is ready after %.1f s", child, child.process.pid, now - child.started_at)

    def _plan_revival(self, child: Child, dead: subprocess.Popen[bytes], now: float) -> None:
        child.process = None
        how = describe(dead.returncode)
        pause = child.pause_after_death(None if child.ready_at is None else now - child.ready_at)
        if pause is None:
            child.is_given_up = True
            logger.critical(
                "%s ended with %s, %d times in a row before it was ready: giving up. Its log above says why; "
                "`keye-worker doctor` checks the whole set-up. %d of %d workers go on.",
                *(child, how, child.deaths_before_ready),
                *(sum(not other.is_given_up for other in self._children), len(self._children)),
            )
            return
        logger.error("%s ended with %s; it is started again in %g s", child, how, pause)
        child.start_at = now + pause

    def workers(self) -> dict[str, tuple[Health, int]]:
        """How each is, and how often it was started again; from any thread."""
        return {child.name: (self._health(child), max(0, child.starts - 1)) for child in self._children}

    def _tell(self, *, is_draining: bool) -> None:
        self._folder.tell({name: health for name, (health, _) in self.workers().items()}, is_draining=is_draining)

    def _health(self, child: Child) -> Health:
        if child.process is None:
            return Health.GIVEN_UP if child.is_given_up else Health.WAITING
        return self._folder.health_of(child.name)

    def _drain(self, signals: "SimpleQueue[int]", outcome: ExitCode) -> ExitCode:
        """Let running jobs finish for `drain_seconds`, then cut them off; a further signal cuts them off at once."""
        draining: list[subprocess.Popen[bytes]] = []
        for child in self._children:
            if child.process is None:
                continue
            if self._folder.health_of(child.name) is Health.LOADING:
                # It has no jobs, and would hear us only once the model is loaded.
                child.process.kill()
                child.process.wait()
            else:
                child.process.terminate()
                draining.append(child.process)
        logger.info("Waiting up to %g s for running jobs. (Once more to force.)", self._drain_seconds)
        cut_off_at = time.monotonic() + self._drain_seconds + KILL_MARGIN_SECONDS
        while any(process.poll() is None for process in draining) and time.monotonic() < cut_off_at:
            self._tell(is_draining=True)
            if _arrived(signals):
                outcome = ExitCode.FORCED
                break
        for process in draining:
            process.kill()  # does nothing to one that has ended
            process.wait()
        if outcome is ExitCode.OK and any(process.returncode != 0 for process in draining):
            outcome = ExitCode.DRAIN_INCOMPLETE
        logger.info("All workers have ended: %s", outcome.meaning)
        return outcome


@contextmanager
def _recorded_signals() -> Iterator["SimpleQueue[int]"]:
    """SIGTERM and SIGINT are only recorded; the loop acts. `SimpleQueue.put` may be called in a signal handler."""
    signals: SimpleQueue[int] = SimpleQueue()
    handlers = {s: signal.signal(s, lambda number, _: signals.put(number)) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signals
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _arrived(signals: "SimpleQueue[int]") -> bool:
    """Wait one tick; did a signal come?"""
    try:
        signals.get(timeout=TICK_SECONDS)
    except Empty:
        return False
    return True
