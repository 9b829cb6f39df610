"""One worker with a server of its own: what a hostile neighbour can reach of both, and what others see."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from celery import Celery
from pydantic import SecretStr
from redis import Redis

from keye.config import keys
from keye.config.faults import JobFailed
from keye.config.job import Priority
from keye.config.outcome import JobFailure
from keye.config.presence import WorkerState, list_present
from keye.config.quarantine import MAX_KEPT_BYTES, QuarantinedMessage
from keye.config.settings import Settings
from keye.config.topology import QUEUE, UNACKED, UNACKED_INDEX, message_list
from keye.producer import Client, Job
from tests.support.checkout import PYTHONPATH
from tests.support.conditions import eventually
from tests.support.redis_login import log_in

LEASE_SECONDS = 3
ECHO = "tests.support.echo_worker"
OPTIONS = ("worker", "--pool", "threads", "--loglevel", "INFO")
BROADCASTS = "/0.celery.pidbox"
MESSAGES = message_list(Priority.NORMAL)
# Whatever else lies in Redis, somebody made a worker put it there.
OURS = ("keye:", "celery-task-meta-", "_kombu.binding", "unacked", QUEUE)


class EchoHost:
    """Ready once entered; echoes, unless another Celery app is given.

    `redis` may do everything; `send` and `broadcast` are a neighbour's, who may do no more.
    """

    def __init__(self, url: str, folder: Path, settings: Mapping[str, str], app: str = ECHO) -> None:
        """`settings` are environment variables besides those that all workers of these tests have."""
        self._command = (sys.executable, "-m", "celery", "-A", app, *OPTIONS)
        self.url = url
        self.redis = Redis.from_url(url, decode_responses=True, socket_timeout=60)
        self.client = Client(Settings(redis_url=SecretStr(url), lease_seconds=LEASE_SECONDS))
        self._log_file = folder / "worker.log"
        chosen = {
            "PYTHONPATH": PYTHONPATH,
            "KEYE_REDIS_URL": url,
            "KEYE_LEASE_SECONDS": str(LEASE_SECONDS),
            "KEYE_DECODERS": "1",
            "KEYE_CACHE_FOLDER": str(folder / "cache"),
            "KEYE_SPOOL_FOLDER": str(folder / "spool"),
        }
        self._environment = {**os.environ, **chosen, **settings}
        self._folder = folder
        self.neighbours = (
            self._user("sender", f"~{QUEUE}*", "+lpush"),
            self._user("caster", f"&{BROADCASTS}", "+publish"),
        )
        self._sender, self._caster = self.neighbours

    def __enter__(self) -> Self:
        with self._log_file.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                cwd=self._folder,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            eventually(self._is_ready, within_seconds=240)
        except BaseException:
            self._process.kill()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._process.terminate()
        self._process.wait(60)
        self.client.close()
        for redis in (self.redis, *self.neighbours):
            redis.close()

    @property
    def log(self) -> str:
        return self._log_file.read_text(errors="replace")

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def send(self, raw: bytes | str, queue: str = MESSAGES) -> None:
        self._sender.lpush(queue, raw)

    def broadcast(self, raw: bytes | str) -> None:
        assert self._caster.publish(BROADCASTS, raw) == 1, "the worker does not listen"

    def ping(self) -> None:
        """Returns once the worker has heard all that was broadcast before, and has answered."""
        with Celery(broker=self.url, set_as_current=False) as app:
            assert app.control.broadcast("ping", reply=True, limit=1, timeout=30), self.log[-4000:]
        # Celery takes its queue for the reply away as it leaves.
        eventually(lambda: not any(self.redis.scan_iter("*.reply.celery.pidbox")))

    def answer_another(self) -> None:
        """A good job behind all that was sent is answered, and by then the worker holds nothing of it any more."""
        job = self.client.submit(prompt="said behind it")
        assert job.result(timeout=60).answer == "said behind it"
        assert self.is_alive
        eventually(lambda: not self.redis.exists(UNACKED, UNACKED_INDEX))

    def quarantined(self, raw: bytes) -> QuarantinedMessage:
        """The newest entry with this message."""

        def look() -> QuarantinedMessage | None:
            entries = (QuarantinedMessage.of(*entry) for entry in self.redis.xrevrange(keys.QUARANTINE))
            return next((e for e in entries if e.raw == raw[:MAX_KEPT_BYTES] and e.size == len(raw)), None)

        return eventually(look)

    def failure(self, job_id: str) -> JobFailure:
        """What the caller of a job hears that ends without an answer."""
        try:
            raise AssertionError(f"it was answered: {self.job(job_id).result(timeout=60)}")
        except JobFailed as failed:
            return failed.failure

    def job(self, job_id: str) -> Job:
        """Of a message by hand, once its worker has written the record."""
        eventually(lambda: self.redis.exists(keys.record(job_id)))
        return self.client.find(job_id)

    def celery_result(self, task_id: str) -> dict[str, Any]:
        """What a plain Celery client reads of a task that has ended."""
        return json.loads(eventually(lambda: self.redis.get(f"celery-task-meta-{task_id}")))

    def foreign_keys(self) -> list[str]:
        return [name for name in self.redis.scan_iter(count=1000) if not name.startswith(OURS)]

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """What is sent meanwhile lies in the queue, in its order, until the worker goes on with all of it."""
        os.kill(self._process.pid, signal.SIGSTOP)
        try:
            eventually(lambda: self._status("State").startswith("T"))
            # To the connection of a worker that waits for messages the server gives the first at once.
            self.send(self.client.submit(prompt="said first", priority=Priority.HIGH).id, QUEUE)
            yield
        finally:
            os.kill(self._process.pid, signal.SIGCONT)

    def peak_bytes(self) -> int:
        """The most memory that the worker has ever held."""
        return 1024 * int(self._status("VmHWM").split()[0])

    def _status(self, name: str) -> str:
        lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith(f"{name}:"))

    def _is_ready(self) -> bool:
        assert self.is_alive, self.log
        return any(presence.state is WorkerState.READY for presence in list_present(self.redis))

    def _user(self, name: str, *rules: str) -> Redis:
        """A connection of somebody who may do what the ACL rules say and nothing else."""
        self.redis.execute_command("ACL", "SETUSER", name, "on", ">password", "resetchannels", *rules)
        return Redis.from_url(log_in(self.url, f"{name}:password"), socket_timeout=60)
