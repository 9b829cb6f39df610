"""One thread that ends this process where it hangs, so that a fresh one may take its place."""

import faulthandler
import logging
import os
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from celery.worker import state

from keye.worker.daemon.exit_codes import ExitCode
from keye.worker.leases.renewal import LeaseRenewal
from keye.worker.periodic_thread import PeriodicThread
from keye.worker.tasks.stragglers import Stragglers
from keye.worker.telemetry.health import Heartbeat
from keye.worker.telemetry.log import FLUSH_SECONDS, flush_log
from keye.worker.telemetry.standard_streams import STDERR, tell_threads

if TYPE_CHECKING:
    from keye.worker.engine.step_loop import Engine

# At most, and several times within the limit that each look sets anew.
LOOK_SECONDS = 0.5
LOOKS_A_LIMIT = 8

# How long after its time a job is not hanging, but slow to look at the clock.
PATIENCE_SECONDS = 15.0
# How long its neighbours may go on before they are requeued, and how long that may take.
FINISH_SECONDS = 5.0
REQUEUE_SECONDS = 5.0
# Beyond the limit of a load: a thread of Python was not let run all this time.
FROZEN_SECONDS = 5.0

logger = logging.getLogger(__name__)


class Watch(PeriodicThread):
    """Looks twice a second or more, from `start` to `stop`; a drain is watched too.

    A dead engine stops the worker in Celery's way. One that hangs in a step takes the process with it at once: nothing
    else frees its device, and only a lease that is no longer renewed frees its jobs. A thread that hangs under a job
    takes the process with it once no other job is held.
    """

    def __init__(
        self,
        engine: "Engine",
        step_seconds: float,
        stragglers: Stragglers,
        renewal: LeaseRenewal,
        heartbeat: Heartbeat,
    ) -> None:
        super().__init__("watch", min(LOOK_SECONDS, step_seconds / LOOKS_A_LIMIT))
        self._engine = engine
        self._step_seconds = step_seconds
        self._stragglers = stragglers
        self._renewal = renewal
        self._heartbeat = heartbeat
        self._requeue_at: float | None = None

    def start(self) -> None:
        self._limit_silence()
        super().start()

    def stop(self) -> None:
        super().stop()
        faulthandler.cancel_dump_traceback_later()

    def turn(self) -> None:
        self._limit_silence()
        self._heartbeat.beat()
        self._look_at_engine()
        self._look_at_jobs()

    def _limit_silence(self) -> None:
        # Native code that keeps Python's lock keeps it from us too; this needs none. It is a thread, though, and a host
        # that starts no more of them is no reason to stop looking.
        with suppress(RuntimeError):
            faulthandler.dump_traceback_later(self._step_seconds, exit=True, file=STDERR)

    def _look_at_engine(self) -> None:
        if not self._engine.is_alive and state.should_stop is None:
            logger.critical("The engine died; this process ends. Its jobs are given back, its log above says why.")
            state.should_stop = ExitCode.ENGINE_DIED
        if (seconds := self._engine.seconds_in_step) > self._step_seconds:
            logger.critical(
                "A step of the engine has taken %.1f s, the limit is %g (KEYE_STEP_SECONDS). This process ends; "
                "its jobs start again once their leases have ended. Where each thread was:",
                *(seconds, self._step_seconds),
            )
            _end(ExitCode.STEP_HUNG)

    def _look_at_jobs(self) -> None:
        overdue = self._stragglers.end_overdue()
        hung = {lease for lease, seconds in overdue.items() if seconds > PATIENCE_SECONDS}
        now = time.monotonic()
        if hung and self._requeue_at is None:
            logger.critical("%d jobs hang in their threads; this process ends once the others are done.", len(hung))
            self._requeue_at = now + FINISH_SECONDS
            if state.should_stop is None:
                state.should_stop = ExitCode.JOB_HUNG
        if self._requeue_at is None or (now < self._requeue_at and self._renewal.held - hung):
            return
        self._renewal.drain()
        if hung and (not self._renewal.held - hung or now >= self._requeue_at + REQUEUE_SECONDS):
            logger.critical("This process ends. Where each thread was:")
            _end(ExitCode.JOB_HUNG)


def limit_load(seconds: float) -> threading.Timer:
    """Ends this process, by 1, unless this is cancelled within so long; the limit of a `Watch` follows.

    A network disk may never answer, and what waits for it can hold Python's lock. Only then does `faulthandler`, which
    needs no lock, tell where each thread was: beside threads that run, its look at them can crash (3.11).
    """
    faulthandler.dump_traceback_later(seconds + FROZEN_SECONDS, exit=True, file=STDERR)
    limit = threading.Timer(seconds, _end_load, (seconds,))
    limit.daemon = True
    limit.start()
    return limit


def _end_load(seconds: float) -> None:
    logger.critical(
        "The model was not ready after %g s (KEYE_LOAD_SECONDS). This process ends. Where each thread was:", seconds
    )
    _end(1)


def _end(code: int) -> None:
    """At once: the threads that hang would be waited for."""
    # The limit on silence may be shorter than what follows, and would end this by another code.
    faulthandler.dump_traceback_later(3 * FLUSH_SECONDS, exit=True, file=STDERR)
    try:
        flush_log()
        tell_threads(FLUSH_SECONDS)
    finally:
        os._exit(code)
