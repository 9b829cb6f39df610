"""docs/collect-many-results.md: what waiting for many jobs costs."""

import time
from collections.abc import Callable
from typing import Any

import pytest
from redis import Redis

from keye.producer import Client
from tests.support.conditions import eventually
from tests.support.sides import RedisWorker


@pytest.mark.holds(
    "docs/collect-many-results.md#how-do-i-collect-many-results",
    "Nothing polls, and one connection waits for all of them.",
)
def test_whoever_waits_for_many_asks_nothing_meanwhile(
    client: Client, redis: Redis, meanwhile: Callable[..., Any]
) -> None:
    jobs = client.submit_many([{"prompt": "?"}] * 500)
    collecting = [meanwhile(lambda part=part: list(client.results(part, timeout=60))) for part in (jobs[:250], jobs)]

    def readers() -> list[str]:
        return [each["id"] for each in redis.client_list() if each["cmd"] == "xread"]

    def asked_within(seconds: float) -> int:
        before = redis.info("stats")["total_commands_processed"]
        time.sleep(seconds)  # what is counted is time that passes
        return int(redis.info("stats")["total_commands_processed"]) - before

    (reader,) = eventually(readers)
    eventually(lambda: asked_within(0.5) <= 2)  # each has looked at its jobs once
    began_at = time.monotonic()
    asked = asked_within(2)
    # A blocked read ends by itself every few seconds; half of it is our own question.
    assert asked <= 2 + 4 * (time.monotonic() - began_at)
    assert readers() == [reader]
    worker = RedisWorker(redis)
    for job in jobs:
        worker.answer(job, "yes")
    assert [len(each.result(30)) for each in collecting] == [250, 500]
