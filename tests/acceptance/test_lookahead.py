"""How many jobs a worker takes: what fills its engine and is soon to, and no more, which other workers are to have."""

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from redis import Redis

from keye.config import keys
from keye.config.codes import JobState
from keye.producer import Client, Job
from tests.acceptance.conftest import ECHO, PICTURE, SlowStore, Start
from tests.support.conditions import eventually
from tests.support.decoder_children import children_of

# Fewer than so many are, at whatever, when another is taken; and all of them may come to wait where a thread was slow.
ON_THEIR_WAY = 16


@pytest.fixture
def held_by(redis: Redis) -> Callable[[int, Sequence[Job]], int]:
    def count(pid: int, jobs: Sequence[Job]) -> int:
        records = [redis.hmget(keys.record(job.id), "state", "worker") for job in jobs]
        return sum(state == JobState.RUNNING and worker.endswith(f":{pid}") for state, worker in records)

    return count


@pytest.mark.holds("docs/operations.md#how-many-jobs-does-a-worker-take-at-a-time", "As many as its engine runs, 64")
@pytest.mark.holds("docs/design.md#decisions", "Preparing and generating are bounded apart")
def test_the_engine_is_filled_with_64_and_what_waits_for_it_is_bounded(
    start: Start, client: Client, redis: Redis, held_by: Callable[[int, Sequence[Job]], int], tmp_path: Path
) -> None:
    settings = {"ECHO_MAX_RUNNING": "64", "KEYE_DECODERS": "1"}
    first = start(*ECHO, "-n", "first@%h", **settings).wait_until_ready().worker.pid
    may_end = tmp_path / "may_end"
    jobs = [client.submit(prompt=f"write {may_end}") for _ in range(110)]

    def num_written() -> int:
        return sum("text" in str(redis.xrange(keys.events(job.id))) for job in jobs)

    eventually(lambda: num_written() == 64, within_seconds=60)
    second = start(*ECHO, "-n", "second@%h", **settings)
    second.wait_until_ready(other_than=first)
    most = 64 + 8 + ON_THEIR_WAY
    eventually(lambda: num_written() >= 64 + 110 - most, within_seconds=60)
    assert 72 <= held_by(first, jobs) <= most
    may_end.touch()
    for job in jobs:
        job.result(timeout=60)


@pytest.mark.holds("docs/operations.md#how-many-jobs-does-a-worker-take-at-a-time", "fewer than twice as many fetch")
@pytest.mark.holds(
    "docs/operations.md#how-many-jobs-does-a-worker-take-at-a-time", "what would wait longer is left to other workers"
)
def test_so_many_jobs_fetch_at_a_time_and_the_next_are_another_workers(
    start: Start, client: Client, slow_store: SlowStore, held_by: Callable[[int, Sequence[Job]], int]
) -> None:
    settings = {"KEYE_DECODERS": "1", "KEYE_S3_ENDPOINT_URL": slow_store.url}
    first = start(*ECHO, "-n", "first@%h", **settings).wait_until_ready().worker.pid
    jobs = [client.submit(prompt="hello", media=["s3://media/picture.png"]) for _ in range(30)]
    eventually(lambda: held_by(first, jobs) >= 16, within_seconds=60)
    second = start(*ECHO, "-n", "second@%h", **settings).wait_until_ready(other_than=first).worker.pid
    eventually(lambda: held_by(second, jobs) >= 30 - 17, within_seconds=60)
    assert 16 <= held_by(first, jobs) <= 17
    slow_store.may_go_on.set()
    for job in jobs:
        job.result(timeout=60)


@pytest.mark.holds(
    "docs/operations.md#how-many-jobs-does-a-worker-take-at-a-time", "fewer than eight wait for a decoder"
)
def test_so_many_jobs_wait_for_a_decoder_and_the_next_are_another_workers(
    start: Start, client: Client, held_by: Callable[[int, Sequence[Job]], int], tmp_path: Path
) -> None:
    picture = tmp_path / "picture.png"
    picture.write_bytes(PICTURE)
    settings = {"KEYE_DECODERS": "1", "KEYE_FRAMES_CACHE_BYTES": "0"}
    first = start(*ECHO, "-n", "first@%h", **settings).wait_until_ready().worker.pid
    # Whoever waits for a decoder that is still being started is in none.
    client.submit(prompt="hello", media=[str(picture)]).result(timeout=60)
    (decoder,) = children_of(first)
    os.kill(decoder, signal.SIGSTOP)
    jobs = [client.submit(prompt="hello", media=[str(picture)]) for _ in range(40)]
    eventually(lambda: held_by(first, jobs) >= 9, within_seconds=60)
    start(*ECHO, "-n", "second@%h", **settings).wait_until_ready(other_than=first)
    most = 1 + 8 + ON_THEIR_WAY
    eventually(lambda: sum(job.state.is_final for job in jobs) >= 40 - most, within_seconds=60)
    assert 9 <= held_by(first, jobs) <= most
    os.kill(decoder, signal.SIGCONT)
    for job in jobs:
        job.result(timeout=60)


@pytest.mark.holds(
    "docs/operations.md#how-many-jobs-does-a-worker-take-at-a-time",
    "`KEYE_CONCURRENCY` bounds all that it has",
    "a low one lets the engine wait",
)
def test_a_bound_on_jobs_in_flight_holds_for_those_in_the_engine_too(
    start: Start, client: Client, held_by: Callable[[int, Sequence[Job]], int], tmp_path: Path
) -> None:
    first = start(*ECHO, "-n", "first@%h", KEYE_CONCURRENCY="2").wait_until_ready().worker.pid
    may_end = tmp_path / "may_end"
    jobs = [client.submit(prompt=f"write {may_end}") for _ in range(8)]
    eventually(lambda: held_by(first, jobs) == 2, within_seconds=60)
    second = start(*ECHO, "-n", "second@%h").wait_until_ready(other_than=first).worker.pid
    eventually(lambda: held_by(second, jobs) == 6, within_seconds=60)
    assert held_by(first, jobs) == 2
    may_end.touch()
    for job in jobs:
        job.result(timeout=60)
