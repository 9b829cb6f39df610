"""docs/collect-many-results.md: what waiting for many jobs costs."""

import time
from collections.abc import Callable
from typing import Any

import pytest
from redis import Redis

from keye.producer import Client
from keye.producer.reader import LOOK_SECONDS
from tests.support.conditions import eventually
from tests.support.sides import RedisWorker


@pytest.mark.holds(
    "docs/collect-many-results.md#how-do-i-collect-many-results",
    "One connection waits for all of them; in case a job is gone, the records of those that say nothing are looked at",
)
def test_whoever_waits_for_many_holds_one_connection_and_asks_little(
    client: Client, redis: Redis, meanwhile: Callable[..., Any]
) -> None:
    jobs = client.submit_many([{"prompt": "?"}] * 500)
    collecting = [meanwhile(lambda part=part: list(client.results(part, timeout=60))) for part in (jobs[:250], jobs)]

    def readers() -> list[str]:
        return [each["id"] for each in redis.client_list() if "b" in each["flags"]]

    (reader,) = eventually(readers)
    began_at, before = time.monotonic(), redis.info("stats")["total_commands_processed"]
    time.sleep(3)  # what is counted is time that passes
    asked = redis.info("stats")["total_commands_processed"] - before
    # Once at first, then in each of the looks, whose time may come twice: record and newest entry of each job.
    looks = 2 + (time.monotonic() - began_at) / LOOK_SECONDS
    assert asked <= looks * 2 * len(jobs) + 100
    eventually(lambda: readers() == [reader])
    worker = RedisWorker(redis)
    for job in jobs:
        worker.answer(job, "yes")
    assert [len(each.result(30)) for each in collecting] == [250, 500]
