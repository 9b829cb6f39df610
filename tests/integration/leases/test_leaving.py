"""Jobs of a newer release go back to the queue, for workers that know them, and not for ever."""

import json
from typing import Any

import pytest
from redis import Redis

from keye.config import keys
from keye.config.job import AnalysisJob
from keye.config.outcome import JobFailure
from keye.config.wire import seal
from keye.producer import Client
from keye.worker.leases.claims import AlreadySettled, QueuedJob
from keye.worker.leases.job_lease import LeaseStore
from keye.worker.results.settlement import Settlement
from keye.worker.tasks.analyze import open_delivery
from keye.worker.tasks.stragglers import expire
from tests.support.leased_jobs import a_job, claim, messages, record

NOT_KNOWN: list[dict[str, Any]] = [{"planted": 1}, {"thinking": "briefly"}, {"media": [{"type": "audio"}]}]


def newer(payload: dict[str, Any]) -> QueuedJob:
    queued, _ = open_delivery(payload | {"schema_version": 99}, "delivery")
    assert queued.is_newer
    return queued


def a_newer_job(**fields: Any) -> dict[str, Any]:
    payload: dict[str, Any] = json.loads(seal(AnalysisJob(prompt="?", **fields)).model_dump_json())
    payload["job"] |= NOT_KNOWN[1]
    return payload


def pause(redis: Redis, job_id: str) -> float:
    """Seconds until it is published again."""
    seconds, microseconds = redis.time()
    due_at = redis.zscore(keys.LEASES, job_id)
    assert due_at is not None
    return due_at - seconds - microseconds / 1e6


def bring_back(store: LeaseStore, redis: Redis, job_id: str) -> None:
    """Its pause is over, and a reaper does its work."""
    redis.zadd(keys.LEASES, {job_id: 1})
    requeued = store.reap(job_id, "reaper")
    assert requeued is not None
    store.publish(requeued)


@pytest.mark.holds(
    "docs/operations.md#how-do-i-upgrade-a-fleet",
    "at first every second, then every five, for `KEYE_NEWER_JOB_SECONDS` in all",
)
def test_pauses_grow_to_five_seconds_and_only_they_count(store: LeaseStore, redis: Redis) -> None:
    job = newer(a_newer_job())
    left, pauses = [], []
    while (seconds := store.leave(job, patience_seconds=20)) is not None:
        left.append(seconds)
        pauses.append(round(pause(redis, job.job_id)))
        bring_back(store, redis, job.job_id)
    assert pauses == [1, 1, 2, 4, 5, 5, 5]
    assert left == [0, 1, 2, 4, 8, 13, 18]


@pytest.mark.holds("docs/operations.md#how-do-i-upgrade-a-fleet", "an older one gives it back to the head of the queue")
def test_a_job_that_was_left_comes_back_at_the_head_of_its_queue(
    store: LeaseStore, redis: Redis, redis_url: str
) -> None:
    job = newer(a_newer_job())
    assert store.leave(job, 600) is not None
    with Client(redis_url) as client:
        others = [client.submit(prompt="?").id for _ in range(2)]
    bring_back(store, redis, job.job_id)
    assert messages(redis) == [job.job_id, *others]


def test_a_claim_by_a_worker_that_knows_it_ends_the_count(store: LeaseStore, redis: Redis) -> None:
    sealed = a_job()
    assert store.leave(QueuedJob.of(sealed), patience_seconds=1) == 0
    bring_back(store, redis, sealed.job_id)
    lease = claim(store, sealed)
    store.requeue([lease])
    assert store.leave(QueuedJob.of(sealed), patience_seconds=1) == 0


def test_a_job_that_runs_or_has_ended_is_not_left(store: LeaseStore, redis: Redis) -> None:
    sealed = a_job()
    claim(store, sealed)
    assert store.leave(QueuedJob.of(sealed), patience_seconds=600) is None
    assert record(redis, sealed.job_id)["state"] == "RUNNING"


@pytest.mark.parametrize("growth", NOT_KNOWN, ids=lambda growth: next(iter(growth)))
def test_a_newer_job_without_a_record_gets_one_with_all_that_can_be_told_of_it(
    store: LeaseStore, redis: Redis, growth: dict[str, Any]
) -> None:
    payload = a_newer_job(priority="high", deadline_seconds=60, max_attempts=2) | {"schema_version": 99}
    payload["job"] |= growth
    store.leave(newer(payload), patience_seconds=600)
    kept = record(redis, payload["job_id"])
    assert (kept["state"], kept["priority"], kept["max_attempts"], kept["attempts"]) == ("QUEUED", "high", "2", "0")
    assert json.loads(kept["sealed"]) == payload
    deadline_at = payload["submitted_at"] + 60
    assert float(kept["deadline_at"]) == redis.zscore(keys.DEADLINES, payload["job_id"]) == deadline_at


def test_a_newer_job_whose_deadline_passes_ends_with_all_that_is_its_own(
    store: LeaseStore, settlement: Settlement, redis: Redis
) -> None:
    payload = a_newer_job(priority="low", deadline_seconds=0.001, idempotency_key="k", metadata={"order": 7})
    entry = f"{payload['job_id']} fingerprint"
    redis.set(keys.idempotency("k"), entry)
    redis.hset(keys.record(payload["job_id"]), mapping=dict(newer(payload).record))
    redis.zadd(keys.queued("low"), {payload["job_id"]: 1})
    redis.zadd(keys.DEADLINES, {payload["job_id"]: 1})
    expire(settlement, store.read_late(payload["job_id"]))
    failure = JobFailure.model_validate_json(record(redis, payload["job_id"])["outcome"])
    assert failure.metadata == {"order": 7}
    assert store.claim(newer(payload), "worker") == AlreadySettled(failure)
    assert redis.ttl(keys.idempotency("k")) > 0
    assert redis.zcard(keys.queued("low")) == 0
