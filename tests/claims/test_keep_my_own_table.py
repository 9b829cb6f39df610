"""docs/keep-my-own-table.md: how far back the feed goes."""

import pytest
from redis import Redis

from keye.config import keys
from keye.producer import Client


@pytest.mark.holds("docs/producers.md#from-any-language", "It holds the newest 100,000")
@pytest.mark.holds("docs/producers.md#many-jobs", "It holds the newest 100,000")
@pytest.mark.holds("docs/keep-my-own-table.md#and-if-it-was-away-for-too-long", "The feed keeps the newest 100,000,")
def test_the_feed_keeps_the_newest_hundred_thousand_or_a_few_more(client: Client, redis: Redis) -> None:
    entry = {"job_id": "1", "state": "SUCCEEDED", "seconds": ""}
    for _ in range(51):
        with redis.pipeline(transaction=False) as filling:
            for _ in range(2_000):
                filling.xadd(keys.ENDED, entry)
            filling.execute()
    job = client.submit(prompt="?")
    job.cancel()
    assert 100_000 <= redis.xlen(keys.ENDED) < 101_000
    ((_, newest),) = redis.xrevrange(keys.ENDED, count=1)
    assert newest["job_id"] == job.id
