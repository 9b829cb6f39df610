"""What outlives jobs and workers is taken away, and nothing else is."""

import time

import pytest
from redis import Redis

from keye.config import keys
from keye.config.job import Priority
from keye.config.topology import LISTENER, LISTENERS, message_list
from keye.producer import Client
from keye.worker.leases.claims import Claimed, QueuedJob
from keye.worker.leases.job_lease import LeaseStore
from keye.worker.results.settlement import Settlement
from keye.worker.telemetry.presence import EXPIRY_SECONDS
from tests.support.leased_jobs import TTL, a_failure, a_job, a_reaper, claim, time_passes

WEEK = 7 * 86400


@pytest.fixture
def kept(redis: Redis) -> None:
    redis.hset(keys.KEPT, mapping={"result": TTL, "dead_letter": WEEK})


def listener(name: str) -> str:
    return name.join(LISTENER)


@pytest.mark.usefixtures("kept")
@pytest.mark.holds(
    "docs/operations.md#which-jobs-failed-for-good-and-how-do-i-send-them-again",
    "Workers take a letter out of the list",
)
def test_dead_letters_that_are_over_or_have_no_job_leave_the_list(
    store: LeaseStore, settlement: Settlement, redis: Redis
) -> None:
    letters = []
    for _ in range(3):
        lease = claim(store, a_job())
        assert settlement.settle(lease, a_failure(lease))
        letters.append(lease.job_id)
    over, gone, stays = letters
    redis.zadd(keys.DEAD_LETTERS, {over: time.time() - WEEK - 60})
    redis.delete(keys.record(gone))
    a_reaper(store).look_around()
    assert redis.zrange(keys.DEAD_LETTERS, 0, -1) == [stays]


@pytest.mark.usefixtures("kept")
@pytest.mark.holds(
    "docs/operations.md#what-became-of-a-message-that-no-worker-could-read", "for `KEYE_DEAD_LETTER_TTL_SECONDS`"
)
@pytest.mark.holds(
    "docs/keep-my-own-table.md#and-if-it-was-away-for-too-long", "none for longer than anything else is kept of it"
)
def test_streams_keep_nothing_of_jobs_that_are_forgotten(store: LeaseStore, redis: Redis) -> None:
    now = int(time.time())
    for stream in (keys.ENDED, keys.QUARANTINE):
        for seconds in (WEEK + 3600, WEEK + 60, WEEK - 60, 1):
            redis.xadd(stream, {"job_id": str(seconds)}, id=f"{(now - seconds) * 1000}-0")
    a_reaper(store).look_around()
    for stream in (keys.ENDED, keys.QUARANTINE):
        assert [fields["job_id"] for _, fields in redis.xrange(stream)] == [str(WEEK - 60), "1"]


@pytest.mark.usefixtures("kept")
def test_who_has_read_the_whole_feed_misses_nothing_when_all_of_it_is_old(
    store: LeaseStore, redis: Redis, redis_url: str
) -> None:
    old = (int(time.time()) - WEEK - 3600) * 1000
    for number in range(2):
        redis.xadd(keys.ENDED, {"job_id": "old", "state": "SUCCEEDED", "seconds": "1"}, id=f"{old}-{number}")
    a_reaper(store).look_around()
    assert [entry for entry, _ in redis.xrange(keys.ENDED)] == [f"{old}-1"]
    redis.xadd(keys.ENDED, {"job_id": "new", "state": "SUCCEEDED", "seconds": "1"})
    with Client(redis_url) as client:
        assert next(client.watch(after=f"{old}-1", timeout=30)).job_id == "new"


@pytest.mark.holds("docs/reliability.md#promises", "dead workers from Celery's list of who hears remote commands")
def test_dead_workers_are_forgotten_and_neighbours_are_not(store: LeaseStore, redis: Redis) -> None:
    now = time.time()
    redis.zadd(keys.NODES, {"dead@host": now - EXPIRY_SECONDS - 5, "alive@host": now})
    redis.sadd(LISTENERS, *map(listener, ("dead@host", "alive@host", "neighbour@host")))
    redis.sadd("_kombu.binding.keye.jobs", "keye.jobs\x06\x16\x06\x16keye.jobs")
    a_reaper(store).look_around()
    assert redis.smembers(LISTENERS) == set(map(listener, ("alive@host", "neighbour@host")))
    assert redis.exists("_kombu.binding.keye.jobs")
    assert redis.zrange(keys.NODES, 0, -1) == ["alive@host"]


@pytest.mark.holds("docs/reliability.md#promises", "Nothing of an ended job stays for ever")
def test_nothing_of_ended_jobs_outlives_all_that_expires_but_the_feed(
    store: LeaseStore, settlement: Settlement, redis: Redis, redis_url: str
) -> None:
    with Client(redis_url) as client:
        cancelled, failed = (client.submit(prompt="?", idempotency_key=key, deadline_seconds=600) for key in "ab")
        cancelled.cancel()
    for job in (cancelled, failed):
        answer = store.claim(QueuedJob(job.id, {}, idempotency_key="b"), "worker")
        if isinstance(answer, Claimed):
            assert settlement.settle(answer, a_failure(answer))
    redis.ltrim(message_list(Priority.NORMAL), 1, 0)
    a_reaper(store).look_around()
    # The sweep believes it is on its way for two leases.
    redis.zincrby(keys.unheard("normal"), -3 * store.lease_seconds, cancelled.id)
    a_reaper(store).look_around()
    time_passes(redis)
    a_reaper(store).look_around()
    assert set(redis.keys()) == {keys.ENDED}
