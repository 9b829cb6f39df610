"""Celery worker processes whose engine echoes: started, frozen and killed; each knows the jobs it holds."""

import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import cast

from redis import Redis

from keye.config import keys
from keye.config.codes import JobState
from keye.config.presence import WorkerState, list_present
from tests.support.conditions import eventually

COMMAND = ("celery", "-A", "tests.support.echo_worker", "worker", "--loglevel", "INFO", "-n")
# All that a worker imports before it reads its settings. Forked from a process that has it a worker is up in 0.3 s, and
# a thousand of them cost a few minutes.
_forking = get_context("forkserver")
_forking.set_forkserver_preload(
    [
        *("__main__", "tests.chaos.echo_workers", "celery.__main__", "celery.bin.celery", "celery.apps.worker"),
        *("keye.worker.broker.transport", "celery.backends.redis", "celery.concurrency.thread"),
        *("keye.worker.daemon.bootsteps", "keye.worker.tasks.analyze", "keye.worker.tasks.quiet_consumer"),
    ]
)


class EchoWorker:
    def __init__(self, number: int, environ: dict[str, str], log_file: Path, redis: Redis, within: Sequence[str]):
        """`within` is a command that runs the worker's, such as `ip netns exec`."""
        self._log_file = log_file
        self._redis = redis
        arguments = (*COMMAND, f"echo{number}@%h")
        self.process = _forking.Process(target=_work, args=(arguments, environ, log_file, tuple(within)))
        self.process.start()
        self.pid = cast(int, self.process.pid)

    @property
    def name(self) -> str:
        return f"{socket.gethostname()}:{self.pid}"

    @property
    def log(self) -> str:
        return self._log_file.read_text()

    @property
    def is_ready(self) -> bool:
        assert self.process.is_alive(), self.log
        present = {presence.worker.name: presence.state for presence in list_present(self._redis)}
        return present.get(self.name) is WorkerState.READY

    def wait_until_ready(self) -> None:
        eventually(lambda: self.is_ready, within_seconds=60)

    def exit_code(self, within_seconds: float) -> int | None:
        """None where it goes on; minus the signal's number where one ended it."""
        self.process.join(within_seconds)
        return self.process.exitcode

    def held_jobs(self) -> list[str]:
        """Ids of the jobs that run here now."""
        job_ids = cast(list[str], self._redis.zrange(keys.LEASES, 0, -1))
        with self._redis.pipeline(transaction=False) as reading:
            for job_id in job_ids:
                reading.hmget(keys.record(job_id), "state", "worker")
            answers = reading.execute()
        running_here = [JobState.RUNNING, self.name]
        return [job_id for job_id, answer in zip(job_ids, answers, strict=True) if answer == running_here]

    def wait_until_holding(self, num_jobs: int, within_seconds: float = 60) -> None:
        eventually(lambda: len(self.held_jobs()) == num_jobs, within_seconds)

    def terminate(self) -> None:
        self.process.terminate()

    def freeze(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)
        eventually(lambda: _state_of(self.pid) == "T", within_seconds=5)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> list[str]:
        """SIGKILL; returns the jobs that it took along."""
        self.process.kill()
        assert self.exit_code(10) == -signal.SIGKILL
        return self.held_jobs()


def _work(arguments: tuple[str, ...], environ: dict[str, str], log_file: Path, within: tuple[str, ...]) -> None:
    """The life of the process."""
    with log_file.open("wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ.update(environ)
    if within:
        os.execvp(within[0], (*within, sys.executable, "-m", *arguments))
    from celery.__main__ import main

    sys.argv = list(arguments)
    try:
        main()
    finally:
        # A forked process leaves without this, which any other does at its end: the last lines would be missing.
        logging.shutdown()


def _state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


class EchoWorkers:
    """Starts workers of one server; a killed one stays dead."""

    def __init__(self, url: str, redis: Redis, folder: Path, lease_seconds: float, **settings: str) -> None:
        """`settings` are environment variables: who forks them may be older than what a test sets."""
        self._url = url
        self._settings = settings
        self._redis = redis
        self._folder = folder
        self._lease_seconds = lease_seconds
        self.started: list[EchoWorker] = []

    def start(
        self, *, drain_seconds: float = 60, url: str | None = None, within: Sequence[str] = (), **settings: str
    ) -> EchoWorker:
        number = len(self.started)
        environ = {
            "KEYE_REDIS_URL": url or self._url,
            "KEYE_LEASE_SECONDS": str(self._lease_seconds),
            "KEYE_DRAIN_SECONDS": str(drain_seconds),
            "KEYE_DECODERS": "1",
            "KEYE_CACHE_FOLDER": str(self._folder / "cache"),
            "KEYE_SPOOL_FOLDER": str(self._folder / "spool"),
            **self._settings,
            **settings,
        }
        log_file = self._folder / f"worker{number}.log"
        log_file.touch()
        self.started.append(EchoWorker(number, environ, log_file, self._redis, within))
        return self.started[-1]

    def start_ready(self, num_workers: int = 1, **settings: str) -> list[EchoWorker]:
        workers = [self.start(**settings) for _ in range(num_workers)]
        for worker in workers:
            worker.wait_until_ready()
        return workers

    @property
    def logs(self) -> str:
        return "".join(worker.log for worker in self.started)

    def end(self) -> None:
        for worker in self.started:
            worker.process.kill()
            worker.process.join()
