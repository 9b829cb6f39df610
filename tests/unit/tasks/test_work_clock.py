"""What a worker's time is charged to, and how long a queue will take by it."""

from contextlib import ExitStack, suppress
from typing import Any

import pytest
from redis import Redis

from keye.config import keys
from keye.config.job import AnalysisJob
from keye.config.wire import kind_of
from keye.producer.client import Client
from keye.producer.status import read_status
from keye.worker.tasks.work_clock import WorkClock


class Time:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time() -> Time:
    return Time()


def measured(redis: Redis) -> dict[str, float]:
    """Seconds a job of each kind."""
    found = {kind: [float(part) for part in sums.split()] for kind, sums in redis.hgetall(keys.WORK).items()}
    return {kind: seconds / weights for kind, (weights, seconds) in found.items()}


def test_jobs_side_by_side_share_the_time_that_the_worker_was_busy(redis: Redis, time: Time) -> None:
    clock = WorkClock(redis, concurrency=2, clock=time)
    with ExitStack() as long:
        long.enter_context(clock.running("long"))
        time.now += 2
        with clock.running("short"):
            time.now += 4
        time.now += 1
    time.now += 50  # idle: nobody's
    clock.hand_on()
    assert measured(redis) == pytest.approx({"short": 2, "long": 5})


def test_a_job_that_ran_among_others_counts_for_more_than_one_alone(redis: Redis, time: Time) -> None:
    clock = WorkClock(redis, concurrency=4, clock=time)
    with clock.running("a"):
        time.now += 8
    with ExitStack() as four:
        for _ in range(4):
            four.enter_context(clock.running("a"))
        time.now += 8
    clock.hand_on()
    assert measured(redis)["a"] == pytest.approx((0.25 * 8 + 4 * 2) / 4.25)


def test_what_failed_is_not_measured(redis: Redis, time: Time) -> None:
    clock = WorkClock(redis, concurrency=1, clock=time)
    with suppress(OSError), clock.running("a"):
        time.now += 8
        raise OSError
    clock.hand_on()
    assert measured(redis) == {}


def test_older_jobs_fade(redis: Redis, time: Time) -> None:
    clock = WorkClock(redis, concurrency=1, clock=time)
    for seconds in (10.0, 1.0):
        for _ in range(200):
            with clock.running("a"):
                time.now += seconds
            clock.hand_on()
    assert measured(redis)["a"] == pytest.approx(1, rel=0.2)


def test_callers_who_invent_kinds_fill_no_memory(redis: Redis, time: Time) -> None:
    clock = WorkClock(redis, concurrency=1, clock=time)
    for number in range(1200):
        with clock.running(f"kind {number}"):
            time.now += 1
    clock.hand_on()
    assert redis.hlen(keys.WORK) == 1000


@pytest.mark.holds(
    "docs/operations.md#how-many-jobs-wait-and-how-many-run",
    "what jobs of the same kind took of a worker's time",
)
def test_what_waits_is_counted_by_its_kinds(redis: Redis, time: Time, client: Client) -> None:
    fields = ({"prompt": "short", "generation": {"max_new_tokens": n}} for n in (16, 500))
    short, long = (AnalysisJob.model_validate(job) for job in fields)
    assert client.status().work_seconds is None
    clock = WorkClock(redis, concurrency=1, clock=time)
    for job, seconds in ((short, 2), (long, 30)):
        with clock.running(kind_of(job)):
            time.now += seconds
    clock.hand_on()
    assert client.status().work_seconds == 0
    for _ in range(10):
        client.submit(short)
    for _ in range(3):
        client.submit(long)
    status = read_status(redis)
    assert status.work_seconds == pytest.approx(10 * 2 + 3 * 30)
    assert status.drain_seconds is None, "nobody is there"
    assert [queue.depth for queue in status.queues] == [0, 13, 0]
    assert "110 s of one worker, no worker is ready" in "\n".join(status.lines())


A_PICTURE, A_CLIP = {"type": "image", "uri": "/a.png"}, {"type": "video", "uri": "/a.mp4"}


@pytest.mark.parametrize(
    ("one", "other", "are_alike"),
    [
        ({"media": [A_PICTURE] * 3}, {"media": [A_PICTURE] * 4}, True),
        ({"media": [A_PICTURE]}, {"media": [A_PICTURE] * 2}, False),
        ({"media": [A_PICTURE]}, {"media": [A_CLIP]}, False),
        ({"media": [A_CLIP | {"max_frames": 8}]}, {"media": [A_CLIP | {"max_frames": 64}]}, False),
        ({"generation": {"max_new_tokens": 100}}, {"generation": {"max_new_tokens": 128}}, True),
        ({"thinking": "no_think"}, {"thinking": "think"}, False),
    ],
)
def test_jobs_of_a_kind_ask_for_about_as_much(one: dict[str, Any], other: dict[str, Any], are_alike: bool) -> None:
    kinds = [kind_of(AnalysisJob.model_validate({"prompt": "?"} | fields)) for fields in (one, other)]
    assert (kinds[0] == kinds[1]) is are_alike
