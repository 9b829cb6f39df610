"""Redis goes away, comes back without its data, is full or forgets under a batch: no line is lost silently."""

import json
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from keye.config import keys
from keye.config.job import Priority
from keye.producer import Client, Settings
from keye.producer.batch.batch import Batch
from tests.chaos.broker import Broker
from tests.integration.batch.conftest import Answering
from tests.integration.batch.mortal import run
from tests.support.conditions import eventually
from tests.support.scale import SCALE, SHORT


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    broker = Broker(tmp_path / "valkey")
    yield broker
    broker.stop()


@pytest.fixture
def client(broker: Broker) -> Iterator[Client]:
    with Client(broker.url) as client:
        yield client


def begin(client: Client, folder: Path, num_lines: int = 20, **options: Any) -> Batch:
    if not (folder / "in.jsonl").exists():
        lines = ({"custom_id": f"c{number}", "prompt": f"say {number}"} for number in range(1, num_lines + 1))
        (folder / "in.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return client.submit_batch(folder / "in.jsonl", folder / "out.jsonl", **options)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def assert_each_has_ended_once(folder: Path, num_lines: int = 20) -> None:
    found = Counter(line["custom_id"] for name in ("out.jsonl", "out.errors.jsonl") for line in read(folder / name))
    assert found == Counter(f"c{number}" for number in range(1, num_lines + 1))


def test_a_server_that_comes_back_with_its_data_is_waited_for(broker: Broker, client: Client, tmp_path: Path) -> None:
    batch = begin(client, tmp_path, max_in_flight=10)
    eventually(lambda: batch.progress.in_flight == 10)
    broker.kill()
    eventually(lambda: "Redis could not" in batch.progress.trouble)
    broker.start_again()
    with Answering(broker.redis) as answering:
        progress = batch.wait(60)
    assert (progress.answered, progress.trouble) == (20, "")
    assert_each_has_ended_once(tmp_path)
    assert set(answering.times.values()) == {1}


@pytest.mark.holds(
    "docs/batches.md#what-does-it-write",
    "`JOB_LOST` | was sent",
)
def test_what_a_server_without_its_data_has_lost_is_told_and_run_again_when_asked_for(
    broker: Broker, client: Client, tmp_path: Path
) -> None:
    batch = begin(client, tmp_path, max_in_flight=10)
    eventually(lambda: batch.progress.in_flight == 10)
    broker.redis.flushall()
    with Answering(broker.redis) as answering:
        progress = batch.wait(60)
        assert (progress.answered, progress.failed) == (10, 10)
        assert {line["code"] for line in read(tmp_path / "out.errors.jsonl")} == {"JOB_LOST"}
        assert_each_has_ended_once(tmp_path)
        assert begin(client, tmp_path, retry_failed=True).wait(60).answered == 20
    assert_each_has_ended_once(tmp_path)
    assert len(answering.times) == 20
    assert set(answering.times.values()) == {1}


def test_nothing_runs_again_unasked_where_the_runner_was_killed_and_the_server_has_lost_its_data(
    broker: Broker, client: Client, tmp_path: Path
) -> None:
    lines = ({"custom_id": f"c{number}", "prompt": "?"} for number in range(1, 21))
    (tmp_path / "in.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    # Before it writes down what it is about to send next.
    assert run(broker.url, tmp_path, step=16) == -signal.SIGKILL
    assert (num_queued := broker.redis.zcard(keys.queued(Priority.LOW))) > 0
    broker.redis.flushall()
    with Answering(broker.redis):
        progress = begin(client, tmp_path).wait(60)
    assert (progress.answered, progress.failed) == (20 - num_queued, num_queued)
    assert {line["code"] for line in read(tmp_path / "out.errors.jsonl")} == {"JOB_LOST"}
    assert_each_has_ended_once(tmp_path)


@pytest.mark.holds(
    "docs/batches.md#what-does-it-write",
    "`OUTCOME_EXPIRED` | was sent",
)
def test_what_ended_and_expired_while_nobody_looked_is_told_from_what_was_never_sent(
    broker: Broker, client: Client, tmp_path: Path
) -> None:
    # As workers tell it.
    broker.redis.hset(keys.KEPT, "result", 1)
    batch = begin(client, tmp_path, max_in_flight=10)
    eventually(lambda: batch.progress.in_flight == 10)
    batch.stop()
    records = [keys.record(job_id) for job_id in broker.redis.zrange(keys.queued(Priority.LOW), 0, -1)]
    with Answering(broker.redis, result_ttl_seconds=1) as first:
        eventually(lambda: not broker.redis.exists(*records))
    with Answering(broker.redis) as answering:
        progress = begin(client, tmp_path).wait(60)
    assert (progress.answered, progress.failed) == (10, 10)
    errors = read(tmp_path / "out.errors.jsonl")
    assert {line["code"] for line in errors} == {"OUTCOME_EXPIRED"}
    assert "kept for 1 s (KEYE_RESULT_TTL_SECONDS)" in errors[0]["message"]
    assert_each_has_ended_once(tmp_path)
    assert set((first.times + answering.times).values()) == {1}
    assert len(first.times + answering.times) == 20


def test_a_full_server_is_waited_for(broker: Broker, client: Client, tmp_path: Path) -> None:
    with broker.refusing_writes("maxmemory", "1"):
        batch = begin(client, tmp_path)
        eventually(lambda: "It is full: give it more memory" in batch.progress.trouble)
    with Answering(broker.redis):
        assert batch.wait(60).answered == 20
    assert_each_has_ended_once(tmp_path)


def test_a_full_queue_is_waited_for(broker: Broker, tmp_path: Path) -> None:
    with Client(Settings(redis_url=broker.url, max_queue_depth=10)) as client:
        batch = begin(client, tmp_path)
        eventually(lambda: "the limit is 10 (KEYE_MAX_QUEUE_DEPTH)" in batch.progress.trouble)
        with Answering(broker.redis) as answering:
            assert batch.wait(60).answered == 20
        assert_each_has_ended_once(tmp_path)
        assert set(answering.times.values()) == {1}


@pytest.mark.skipif(SCALE is SHORT, reason="one of the long ones of make soak")
def test_a_frozen_server_is_waited_for(broker: Broker, client: Client, tmp_path: Path) -> None:
    batch = begin(client, tmp_path, max_in_flight=10)
    eventually(lambda: batch.progress.in_flight == 10)
    pid = broker.redis.info("server")["process_id"]
    os.kill(pid, signal.SIGSTOP)
    eventually(lambda: batch.progress.trouble, within_seconds=60)
    os.kill(pid, signal.SIGCONT)
    with Answering(broker.redis) as answering:
        assert batch.wait(60).answered == 20
    assert_each_has_ended_once(tmp_path)
    assert set(answering.times.values()) == {1}


def test_jobs_that_an_operator_cancels_or_forgets_are_a_failure_each(
    broker: Broker, client: Client, tmp_path: Path
) -> None:
    batch = begin(client, tmp_path, max_in_flight=10)
    eventually(lambda: batch.progress.in_flight == 10)
    cancelled, forgotten = broker.redis.zrange(keys.queued(Priority.LOW), 0, 1)
    client.job(cancelled).cancel()
    broker.redis.delete(keys.record(forgotten))
    broker.redis.zrem(keys.queued(Priority.LOW), forgotten)
    with Answering(broker.redis):
        progress = batch.wait(60)
    assert (progress.answered, progress.failed) == (18, 2)
    assert {line["code"] for line in read(tmp_path / "out.errors.jsonl")} == {"CANCELLED", "JOB_LOST"}
    assert_each_has_ended_once(tmp_path)
