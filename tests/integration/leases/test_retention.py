"""A job that says itself how long it is kept, however and by whomever it is ended: nothing of it outlives that."""

import json
from collections.abc import Callable, Iterator

import pytest
from redis import Redis

from keye.config import keys
from keye.config.codes import ErrorCode, JobState, Stage
from keye.config.outcome import JobFailure, JobResult
from keye.config.topology import result_key
from keye.config.wire import SealedJob, open_sealed, seal
from keye.producer import AnalysisJob, Client, InvalidJob, Job
from keye.worker.leases.claims import (
    AlreadySettled,
    Claimed,
    LateJob,
    QueuedJob,
    TakenOver,
)
from keye.worker.leases.job_lease import LeaseStore
from keye.worker.results.outbox import Verdict
from keye.worker.results.settlement import Settlement
from keye.worker.tasks.analyze import open_delivery
from keye.worker.tasks.stragglers import dead_letter, expire
from tests.support.conditions import eventually
from tests.support.leased_jobs import DEAD_LETTER_TTL, TTL, a_failure, an_answer, claim

OWN = 120


@pytest.fixture
def producer(redis_url: str) -> Iterator[Client]:
    with Client(redis_url) as client:
        yield client


def send(producer: Client, redis: Redis, own: int = OWN) -> tuple[Job, SealedJob]:
    job = producer.submit(prompt="?", idempotency_key="k", result_ttl_seconds=own, deadline_seconds=600)
    return job, open_sealed(json.loads(redis.hget(keys.record(job.id), "sealed")))


def ttls(redis: Redis, job: Job) -> dict[str, int]:
    names = (keys.record(job.id), keys.events(job.id), keys.idempotency("k"), result_key(job.id))
    return {name: redis.ttl(name) for name in names if redis.exists(name)}


@pytest.mark.holds(
    "docs/producers.md#from-python",
    "`result_ttl_seconds` is how long a job is kept once it has ended, whatever became of it",
    "Its record, events, idempotency key and Celery result go together; no dead letter outlives them.",
)
@pytest.mark.parametrize("own", [OWN, 30 * 86400])
@pytest.mark.parametrize("end", [an_answer, a_failure])
def test_job_is_kept_for_as_long_as_it_says_whether_it_was_answered_or_failed(
    producer: Client,
    store: LeaseStore,
    settlement: Settlement,
    redis: Redis,
    end: Callable[[Claimed], JobResult | JobFailure],
    own: int,
) -> None:
    job, sealed = send(producer, redis, own)
    lease = claim(store, sealed)
    assert settlement.settle(lease, end(lease))
    found = ttls(redis, job)
    assert len(found) == 4
    assert all(own - 5 < seconds <= own for seconds in found.values()), found


@pytest.mark.holds("docs/operations.md#which-jobs-failed-for-good-and-how-do-i-send-them-again", "A job that says so")
def test_dead_letter_goes_with_its_job_and_one_that_is_sent_again_takes_its_time_along(
    producer: Client, store: LeaseStore, settlement: Settlement, redis: Redis
) -> None:
    job, sealed = send(producer, redis)
    lease = claim(store, sealed)
    settlement.settle(lease, a_failure(lease))
    redis.persist(keys.record(job.id))
    again = producer.dead_letters.requeue(producer.dead_letters.find(job.id))
    assert OWN - 5 < redis.ttl(keys.record(job.id)) <= OWN
    assert open_sealed(json.loads(redis.hget(keys.record(again.id), "sealed"))).job.result_ttl_seconds == OWN


def test_cancelled_or_late_in_the_queue_it_is_kept_as_it_says_once_its_message_is_gone(
    producer: Client, store: LeaseStore, settlement: Settlement, redis: Redis
) -> None:
    # What workers say is not for this job.
    redis.hset(keys.KEPT, mapping={"result": TTL, "dead_letter": DEAD_LETTER_TTL})
    for way in ("cancel", "expire"):
        job, sealed = send(producer, redis)
        if way == "cancel":
            job.cancel()
        else:
            redis.hset(keys.record(job.id), "deadline_at", "1")
            expire(settlement, LateJob(job.id, sealed.model_dump_json(), 0))
        assert job.state is (JobState.CANCELLED if way == "cancel" else JobState.EXPIRED)
        settled = store.claim(QueuedJob.of(sealed), "worker")
        assert isinstance(settled, AlreadySettled)
        settlement.tell_celery(job.id, settled.outcome, OWN)
        found = ttls(redis, job)
        assert len(found) == 4
        assert all(OWN - 5 < seconds <= OWN for seconds in found.values()), (way, found)
        redis.delete(keys.idempotency("k"))


def test_job_whose_workers_died_is_kept_as_it_says(
    producer: Client, brief: LeaseStore, settlement: Settlement, redis: Redis
) -> None:
    job, sealed = send(producer, redis)
    redis.hset(keys.record(job.id), "max_attempts", 1)
    claim(brief, sealed)
    eventually(lambda: brief.due(keys.LEASES, 10))
    taken = brief.reap(job.id, "reaper")
    assert isinstance(taken, TakenOver)
    dead_letter(settlement, taken)
    found = ttls(redis, job)
    assert len(found) == 4
    assert all(OWN - 5 < seconds <= OWN for seconds in found.values()), found


def test_job_that_no_release_here_can_read_is_kept_as_it_says(
    store: LeaseStore, settlement: Settlement, redis: Redis
) -> None:
    sealed = seal(AnalysisJob(prompt="?", result_ttl_seconds=OWN)).model_dump(mode="json")
    for payload in ({**sealed, "schema_version": 99}, {**sealed, "job": {**sealed["job"], "novelty": 1}}):
        redis.flushall()
        queued, _ = open_delivery(payload, payload["job_id"])
        lease = store.claim(queued, "worker")
        assert isinstance(lease, Claimed)
        settlement.settle(lease, a_failure(lease))
        assert OWN - 5 < redis.ttl(keys.record(lease.job_id)) <= OWN


def test_outcome_that_waits_on_disk_still_knows_for_how_long(producer: Client, store: LeaseStore, redis: Redis) -> None:
    _, sealed = send(producer, redis)
    lease = claim(store, sealed)
    failure = JobFailure(
        job_id=lease.job_id, code=ErrorCode.INTERNAL, message="?", stage=Stage.OPEN, retryable=True, attempts=1
    )
    spooled = Verdict(lease=lease, outcome=failure).model_dump_json()
    assert Verdict.model_validate_json(spooled).lease.result_ttl_seconds == OWN


@pytest.mark.holds("docs/producers.md#from-python", "From a minute to ten years")
@pytest.mark.parametrize("seconds", [59, 3650 * 86400 + 1, 60.5, "soon", True])
def test_time_that_redis_or_nobody_keeps_is_refused(producer: Client, seconds: object) -> None:
    with pytest.raises(InvalidJob, match="1 fault: result_ttl_seconds"):
        producer.submit(prompt="?", result_ttl_seconds=seconds)
