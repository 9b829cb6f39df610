"""A producer and a worker who may do what docs/operations.md says that they need, and nothing else."""

import re
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest
from pydantic import SecretStr
from redis.exceptions import ResponseError

from keye.config.settings import Settings
from keye.producer import Client, Job
from keye.worker.daemon.findings import Severity, select
from keye.worker.daemon.preflight import check_broker
from keye.worker.tasks.celery_app import build_app
from tests.chaos.echo_workers import EchoWorkers
from tests.support.conditions import eventually
from tests.support.debian import need
from tests.support.pages import printed
from tests.support.redis_server import RedisServer

LEASE_SECONDS = 3
(RIGHTS,) = printed("docs/operations.md", "What rights does a user of Redis need?", "")
LINES = {line.split()[2]: line.split() for line in RIGHTS.splitlines()}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path / "redis") as server:
        for line in LINES.values():
            server.redis.execute_command(*line)
        yield server


def url_of(user: str, server: RedisServer) -> str:
    return server.url.replace("redis://", f"redis://{user}:secret@")


def do_everything(client: Client, workers: EchoWorkers, worker_url: str, folder: Path) -> None:
    """What the documents show, and what befalls jobs."""
    findings = list(check_broker(worker_url, LEASE_SECONDS, False))
    assert select(findings, Severity.FAULT) == []
    waits, *refused = client.submit_many([{"prompt": "too late", "deadline_seconds": 1}, {"prompt": ""}])
    assert isinstance(waits, Job), refused
    queued = client.submit(prompt="?", priority="low", idempotency_key="key")
    assert queued.cancel() == "cancelled"
    (worker,) = workers.start_ready()
    assert client.submit(prompt="hello", idempotency_key="another").result(60).answer == "hello"
    assert [event.type for event in client.submit(prompt="x").events(60)][-1] == "ended"
    running = client.submit(prompt="wait 60")
    eventually(lambda: running.progress.state == "RUNNING", within_seconds=60)
    assert running.cancel() == "requested"
    assert running.state in ("RUNNING", "CANCELLED")
    assert list(client.results([waits, running], timeout=60))
    assert running.id in {job.job_id for job in client.list_jobs(codes=["CANCELLED"]).jobs}
    assert client.job_status(running.id).code == "CANCELLED"
    failed = client.submit(prompt="raise MemoryError", max_attempts=1)
    eventually(lambda: failed.state == "FAILED", within_seconds=60)
    client.dead_letters.requeue(next(client.dead_letters.select()))
    assert [each.answer for each in client.map("a", [[]])] == ["a"]
    (lines := folder / "in.jsonl").write_text('{"custom_id": "a", "prompt": "hello"}\n')
    assert client.submit_batch(lines, folder / "out.jsonl").wait(60).answered == 1
    assert next(client.watch(after="0", timeout=5)).id
    assert client.overview().workers
    late = client.submit(prompt="?", priority="low")
    assert dict(client.cancel_queued([late.id])).keys() == {late.id}
    assert list(client.quarantine.select()) == []
    retried = client.submit(prompt="?", media=["s3://bucket/nowhere.jpg"])
    # A worker imports boto first.
    eventually(lambda: retried.progress.attempt and retried.state == "QUEUED", within_seconds=90)
    retried.cancel()
    app = build_app(Settings.read(redis_url=SecretStr(worker_url)))
    assert app.control.inspect(timeout=5).ping()
    # A worker that dies, whose job another takes up.
    client.submit(prompt="wait 5")
    worker.wait_until_holding(1)
    (lost,) = worker.kill()
    workers.start_ready()
    client.job(lost).result(60)
    workers.started[-1].terminate()
    workers.started[-1].exit_code(30)


class Recorder:
    """The commands of each user, those of scripts too. A context manager."""

    def __init__(self, server: RedisServer, file: Path) -> None:
        self._redis, self._file = server.redis, file
        self._command = [need("redis-cli"), "-p", str(server.port), "monitor"]
        self._users: dict[str, str] = {}
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._ask_who_is_there)

    def __enter__(self) -> Self:
        with self._file.open("wb") as output:
            self._monitor = subprocess.Popen(self._command, stdout=output)
        eventually(lambda: b"OK" in self._file.read_bytes())
        self._thread.start()
        return self

    def _ask_who_is_there(self) -> None:
        while not self._is_over.wait(0.05):
            self._users |= {each["addr"]: each["user"] for each in self._redis.client_list()}

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()
        self._monitor.terminate()
        self._monitor.wait()

    def commands_of(self, user: str) -> set[tuple[str, ...]]:
        found, whose = set(), ""
        for line in self._file.read_text().splitlines():
            if match := re.fullmatch(r"[\d.]+ \[\d+ ([^\]]*)\] (.*)", line):
                if match[1] != "lua":
                    whose = self._users.get(match[1], "")
                if whose == user:
                    words = re.findall(r'"((?:[^"\\]|\\.)*)"', match[2])
                    found.add(tuple(word.encode().decode("unicode_escape") for word in words))
        return found


@pytest.mark.holds(
    "docs/operations.md#what-rights-does-a-user-of-redis-need", "ACL SETUSER producer", "That is all that clients do"
)
def test_what_the_page_grants_is_enough_and_none_of_it_too_much(server: RedisServer, tmp_path: Path) -> None:
    store = {"KEYE_S3_ENDPOINT_URL": "http://127.0.0.1:1", "AWS_ACCESS_KEY_ID": "no", "AWS_SECRET_ACCESS_KEY": "body"}
    workers = EchoWorkers(url_of("worker", server), server.redis, tmp_path, LEASE_SECONDS, **store)
    try:
        with Recorder(server, tmp_path / "commands") as recorder, Client(url_of("producer", server)) as client:
            do_everything(client, workers, url_of("worker", server), tmp_path)
    finally:
        workers.end()
    assert server.redis.execute_command("ACL", "LOG", 99) == []

    for user, line in LINES.items():
        commands = recorder.commands_of(user)
        assert len(commands) > 50
        assert denied(server, commands, line[3:]) == []
        for rule in [rule for rule in line[5:] if rule[0] in "~&+"]:
            rest = [each for each in line[3:] if each != rule]
            assert denied(server, commands, rest), f"{user} does not need {rule}"


def denied(server: RedisServer, commands: set[tuple[str, ...]], rules: list[str]) -> list[tuple[str, ...]]:
    """Those that a user of these rules may not run."""
    server.redis.execute_command("ACL", "SETUSER", "less", "reset", *rules)
    return [command for command in commands if is_denied(server, command)]


def is_denied(server: RedisServer, command: tuple[str, ...]) -> bool:
    try:
        return server.redis.execute_command("ACL", "DRYRUN", "less", *command) != "OK"
    except ResponseError:
        # Known to newer servers alone, or cut short.
        return False
