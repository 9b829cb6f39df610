"""docs/architecture.md: where a job lies, who may move it, and what becomes of it when that one dies."""

import json

import pytest
from redis import Redis

from keye.config import keys
from keye.config.codes import JobState
from keye.config.wire import SealedJob, open_sealed
from keye.producer import Cancellation, Client, Job
from keye.worker.leases.claims import AlreadySettled, HeldElsewhere, QueuedJob
from keye.worker.leases.job_lease import LeaseStore
from keye.worker.results.settlement import Settlement
from tests.support.leased_jobs import a_failure, a_reaper, claim, messages


@pytest.mark.holds(
    "docs/architecture.md#a-jobs-way",
    "the job is | it lies in | who may move it | if that one dies",
    "each move is one script in Redis, and only the newest token's holder may settle",
)
def test_a_job_lies_where_the_table_says_and_is_moved_by_whom_it_names(client: Client, redis: Redis) -> None:
    store, settlement = LeaseStore(redis, lease_seconds=30), Settlement(redis, 600, 600)
    reaper = a_reaper(store)
    job, unwanted = client.submit(prompt="?"), client.submit(prompt="?")
    sealed = sealed_of(redis, job)

    assert lies_in(redis, job) == {"its record", "a message"}
    assert unwanted.cancel() is Cancellation.CANCELLED
    redis.delete("keye.jobs\x06\x163")
    redis.zadd(keys.queued("normal"), {job.id: 1})
    for _ in range(2):  # missed once, it may be on its way
        reaper.look_around()
    assert lies_in(redis, job) == {"its record", "a message"}, "one that was lost is published again"

    dead = claim(store, sealed, "worker-1")
    redis.delete("keye.jobs\x06\x163")
    assert (job.state, lies_in(redis, job)) == (JobState.RUNNING, {"its record", "the leases"})
    assert store.claim(QueuedJob.of(sealed), "worker-2") == HeldElsewhere()
    redis.zadd(keys.LEASES, {job.id: 1})
    reaper.look_around()
    assert (job.state, lies_in(redis, job)) == (JobState.QUEUED, {"its record", "a message"})

    lease = claim(store, sealed, "worker-2")
    redis.delete("keye.jobs\x06\x163")
    assert not settlement.settle(dead, a_failure(dead)), "its token is not the newest"
    assert store.retry(lease, a_failure(lease), 60, None) == "queued"
    assert (job.state, lies_in(redis, job)) == (JobState.QUEUED, {"its record", "the leases"})
    reaper.look_around()
    assert messages(redis) == [], "it is not due"
    redis.hset(keys.record(job.id), "due_at", 1)
    redis.zadd(keys.LEASES, {job.id: 1})
    reaper.look_around()
    assert lies_in(redis, job) == {"its record", "a message"}

    last = claim(store, sealed, "worker-3", is_alone=True)
    redis.delete("keye.jobs\x06\x163")
    assert settlement.settle(last, a_failure(last))
    assert (job.state, lies_in(redis, job)) == (JobState.FAILED, {"its record"})
    assert 0 < redis.ttl(keys.record(job.id)) <= 600
    assert isinstance(store.claim(QueuedJob.of(sealed), "worker-4"), AlreadySettled)
    assert job.cancel() is Cancellation.ALREADY_ENDED


def sealed_of(redis: Redis, job: Job) -> SealedJob:
    return open_sealed(json.loads(redis.hget(keys.record(job.id), "sealed")))


def lies_in(redis: Redis, job: Job) -> set[str]:
    places = {
        "its record": redis.exists(keys.record(job.id)),
        "a message": job.id in messages(redis),
        "the leases": redis.zscore(keys.LEASES, job.id) is not None,
    }
    return {place for place, is_there in places.items() if is_there}
