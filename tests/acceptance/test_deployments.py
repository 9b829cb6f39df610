"""Several deployments in one database, each with a prefix: what they share is nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from celery import Celery, chord
from redis import Redis

from keye.config.codes import ErrorCode, JobState
from keye.config.connection import connect
from keye.config.faults import DeadLetterNotFound, JobFailed, JobNotFound
from keye.config.topology import ANALYZE_TASK, QUEUE, body_of, message_around
from keye.producer import Client, Job
from tests.acceptance.celery_clients import ask, printed, send
from tests.acceptance.conftest import ECHO, Start, Started
from tests.support.checkout import PYTHONPATH
from tests.support.conditions import eventually
from tests.support.redis_login import log_in

INSPECT = ("celery", "-A", "keye.worker.tasks.celery_app", "inspect", "ping")
ONLY_BLUE = "~blue:* &blue:* &blue:/0.celery.pidbox"


@pytest.fixture
def blue_url(redis: Redis, redis_url: str) -> Iterator[str]:
    """The URL of a user who reaches nothing but what begins with `blue:`; all that it was refused fails the test."""
    redis.execute_command("ACL", "LOG", "RESET")
    redis.execute_command("ACL", "SETUSER", "blue", *f"reset on >secret {ONLY_BLUE} +@all".split())
    yield log_in(redis_url, "blue:secret")
    refused = redis.execute_command("ACL", "LOG")
    redis.execute_command("ACL", "DELUSER", "blue")
    assert refused == []


@pytest.fixture
def start_with(start: Start, tmp_path: Path) -> Iterator[Callable[..., Started]]:
    """A ready worker with this prefix, which reaches Redis by this URL."""
    with ExitStack() as connected:

        def run(prefix: str, url: str, **settings: str) -> Started:
            own = {"KEYE_KEY_PREFIX": prefix, "KEYE_REDIS_URL": url, "KEYE_LEASE_SECONDS": "2"}
            worker = start(*ECHO, "-n", f"of-{prefix.rstrip(':')}@%h", **own, **settings)
            worker.redis = connected.enter_context(connect(url, key_prefix=prefix))
            worker.wait_until_ready()
            return worker

        yield run


@pytest.fixture
def blue_app(blue_url: str) -> Iterator[Celery]:
    """A client's, with the options that the page prints."""
    with Celery("client", broker=blue_url, backend=blue_url, set_as_current=False) as app:
        app.finalize()
        app.tasks.pop(ANALYZE_TASK, None)
        (options,) = (block for block in printed() if "global_keyprefix" in block)
        exec(options, {"app": app})
        yield app
        app.backend.result_consumer.subscribed_to.clear()


def code_of(job: Job) -> ErrorCode:
    with pytest.raises(JobFailed) as failed:
        job.result(timeout=60)
    return failed.value.code


def nodes(url: str, prefix: str) -> list[str]:
    """Who answers an operator in the environment of these workers."""
    environ = os.environ | {"KEYE_REDIS_URL": url, "KEYE_KEY_PREFIX": prefix, "PYTHONPATH": PYTHONPATH}
    command = [sys.executable, "-m", *INSPECT, "--json", "--timeout", "5"]
    told = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
    assert told.returncode == 0, told.stderr
    return [name.partition("@")[0] for name in json.loads(told.stdout)]


@pytest.mark.holds(
    "docs/operations.md#how-do-several-deployments-share-a-server",
    "the name of every key and channel begins with `blue:`",
    "with `~blue:* &blue:* &blue:/0.celery.pidbox` in the place of other names",
)
@pytest.mark.holds(
    "docs/celery.md#share-a-database-with-other-apps",
    "Workers with a `KEYE_KEY_PREFIX` share nothing",
    "Their clients, and apps that go on",
    'prefix = "blue:"',
    "`celery -A keye.worker.tasks.celery_app inspect ping` finds them",
)
@pytest.mark.holds("docs/celery.md#send-a-job-wait-for-its-answer", "is a `global_keyprefix`")
def test_whatever_becomes_of_its_jobs_a_deployment_keeps_to_its_prefix(
    start_with: Callable[..., Started], blue_url: str, blue_app: Celery, redis: Redis, tmp_path: Path
) -> None:
    first = start_with("blue:", blue_url, KEYE_CELERY_CANVAS="keye.jobs/*")
    with Client(blue_url, key_prefix="blue:") as client:
        assert client.submit(prompt="hello", idempotency_key="k").result(timeout=60).answer == "hello"
        again = {"prompt": "raise ValueError", "idempotency_key": "again", "retry_failed": True}
        assert {code_of(client.submit(**again)) for _ in range(2)} == {ErrorCode.INTERNAL}
        running = client.submit(prompt="wait 300")
        next(running.events(timeout=60))
        began_at = time.monotonic()
        assert running.cancel() == "requested"
        assert code_of(running) is ErrorCode.CANCELLED
        assert time.monotonic() - began_at < 5  # without the channel a worker looks later
        assert code_of(client.submit(prompt="wait 300", deadline_seconds=1)) is ErrorCode.DEADLINE_EXCEEDED
        tried = client.submit(prompt="?", media=["s3://nowhere/1.png"], max_attempts=2)
        requeued, purged = client.dead_letters.select()
        assert client.dead_letters.requeue(requeued).id
        client.dead_letters.purge(purged)
        assert send(blue_app, "hello").get(timeout=60)["answer"] == "hello"
        count = chord([ask(blue_app, "one"), ask(blue_app, "two")], ask(blue_app, "three"))
        assert count.apply_async().get(timeout=60)["answer"] == "three"
        revoked = send(blue_app, "wait 300")
        eventually(lambda: redis.hget(f"blue:keye:job:{revoked.id}", "state") == "RUNNING")
        blue_app.control.revoke(revoked.id)
        with pytest.raises(JobFailed, match="CANCELLED"):
            revoked.get(timeout=60)
        redis.lpush(f"blue:{QUEUE}", "no message")
        eventually(lambda: client.status().quarantined_messages == 1)
        assert nodes(blue_url, "blue:") == ["of-blue"]
        # A worker that dies: its jobs, and a message that it had not claimed.
        lost = client.submit(prompt=f"write {tmp_path / 'over'}")
        eventually(lambda: lost.state is JobState.RUNNING)
        first.process.send_signal(signal.SIGKILL)
        redis.hset("blue:keye:unacked", "tag", json.dumps([json.loads(by_hand("late")), "", QUEUE]))
        redis.zadd("blue:keye:unacked-index", {"tag": 1})
        (tmp_path / "over").touch()
        second = start_with("blue:", blue_url, KEYE_DRAIN_SECONDS="1")
        assert lost.result(timeout=60).attempts == 2
        assert client.job("late").result(timeout=60).answer == "by hand"
        with suppress(JobFailed):
            tried.result(timeout=60)
        # One that ends gives its jobs back.
        waits = client.submit(prompt="wait 300")
        eventually(lambda: waits.state is JobState.RUNNING)
        second.ask_to_end()
        assert second.exit_code() == 0
        assert waits.state is JobState.QUEUED
        assert client.verify()[1] == []
        queued = client.submit(prompt="?", idempotency_key="q")
        queued.cancel()
        assert queued.state is JobState.CANCELLED
    assert [name for name in redis.keys("*") if not name.startswith("blue:")] == []


def by_hand(job_id: str) -> str:
    return message_around(body_of({"job": {"prompt": "by hand"}}), job_id, 3, is_recorded=False)


@pytest.mark.holds(
    "docs/operations.md#how-do-several-deployments-share-a-server",
    "a deployment sees no other's jobs, results, dead letters or workers",
)
def test_deployments_of_one_database_see_nothing_of_each_other(
    start_with: Callable[..., Started], redis: Redis, redis_url: str
) -> None:
    prefixes = ("", "a:", "b:")
    workers = {prefix: start_with(prefix, redis_url) for prefix in prefixes}
    with ExitStack() as opened:
        clients = {prefix: opened.enter_context(Client(redis_url, key_prefix=prefix)) for prefix in prefixes}
        running = {prefix: client.submit(prompt="wait 300", idempotency_key="k") for prefix, client in clients.items()}
        failed = {prefix: client.submit(prompt="raise ValueError") for prefix, client in clients.items()}
        assert len({job.id for job in running.values()}) == len(prefixes)
        for prefix, client in clients.items():
            assert code_of(failed[prefix]) is ErrorCode.INTERNAL
            eventually(lambda prefix=prefix: running[prefix].state is JobState.RUNNING)
            (letter,) = client.dead_letters.select()
            assert letter.job_id == failed[prefix].id
            status = client.status()
            assert [worker.worker.pid for worker in status.workers] == [workers[prefix].process.pid]
            assert (status.running, status.dead_letters) == (1, 1)
            ledger, irregular = client.verify()
            assert (ledger.records.keys(), irregular) == ({running[prefix].id, failed[prefix].id}, [])
            assert nodes(redis_url, prefix) == [f"of-{prefix.rstrip(':')}"]
            assert next(client.watch(after="0", timeout=10)).job_id == failed[prefix].id
            (other, *_) = (job for each, job in failed.items() if each != prefix)
            for look in (client.find, client.dead_letters.find):
                with pytest.raises((JobNotFound, DeadLetterNotFound)):
                    look(other.id)
        # Cancelled by one of them, the others' go on.
        running["a:"].cancel()
        assert code_of(running["a:"]) is ErrorCode.CANCELLED
        workers["b:"].process.kill()
        clients["b:"].submit(prompt="hello")
        clients["a:"].dead_letters.purge(clients["a:"].dead_letters.find(failed["a:"].id))
        assert clients["a:"].submit(prompt="hello").result(timeout=60).answer == "hello"
        assert [client.status().dead_letters for client in clients.values()] == [1, 0, 1]
        assert running[""].state is JobState.RUNNING
        assert clients["b:"].status().queues[1].depth == 1
        assert {name.partition(":")[0] for name in redis.keys("*:keye:job:*")} == {"a", "b"}
