"""How jobs end on a real server: once, by the newest claim, and with all that belongs to it in one move."""

import json
import time
from dataclasses import replace

import pytest
from redis import Redis

from keye.config import keys
from keye.config.codes import ErrorCode, JobState, Stage
from keye.config.event import JobEnded, StageStarted
from keye.config.job import Priority
from keye.config.outcome import OUTCOME, FailedAttempt, JobFailure
from keye.config.topology import UNACKED, UNACKED_INDEX, result_key
from keye.config.wire import SealedJob
from keye.worker.broker.canvas import Asked, Canvas
from keye.worker.leases.claims import (
    AlreadySettled,
    Claimed,
    QueuedJob,
    Requeued,
    TakenOver,
)
from keye.worker.leases.job_lease import LeaseStore
from keye.worker.results.event_writer import AttemptEvents, EventWriter
from keye.worker.results.settlement import Settlement
from tests.support.conditions import eventually
from tests.support.leased_jobs import (
    DEAD_LETTER_TTL,
    TTL,
    a_failure,
    a_job,
    a_reaper,
    claim,
    events,
    messages,
    publish,
    record,
)


def test_claim_that_the_server_forgot_in_a_crash_cannot_settle_beside_the_next(
    store: LeaseStore, settlement: Settlement, redis: Redis
) -> None:
    sealed = a_job()
    forgotten = claim(store, sealed, "worker-1")
    redis.flushall()
    remembered = claim(store, sealed, "worker-2")
    assert forgotten.attempt == remembered.attempt == 1
    assert store.renew([forgotten]) == ["lost"]
    assert not settlement.settle(forgotten, a_failure(forgotten))
    assert settlement.settle(remembered, a_failure(remembered))


@pytest.mark.holds(
    "docs/celery.md#send-a-job-wait-for-its-answer",
    "Both are kept for `KEYE_RESULT_TTL_SECONDS`,",
)
@pytest.mark.holds(
    "docs/architecture.md#a-jobs-way",
    "flowchart TB subgraph producers [Your",
)
@pytest.mark.holds("docs/design.md#decisions", "outcome, last event, state, expiry")
@pytest.mark.holds(
    "docs/operations.md#redis-is-full-what-must-i-do",
    "lower `KEYE_RESULT_TTL_SECONDS` (for jobs that end from now on)",
)
def test_settling_writes_outcome_state_last_event_and_expiry_in_one_go(
    store: LeaseStore, settlement: Settlement, redis: Redis
) -> None:
    sealed = a_job(idempotency_key="receipt-7")
    redis.set(keys.idempotency("receipt-7"), f"{sealed.job_id} fingerprint")
    lease = claim(store, sealed)
    failure = a_failure(lease)

    assert settlement.settle(lease, failure)

    fields = record(redis, sealed.job_id)
    assert fields["state"] == JobState.FAILED
    assert OUTCOME.validate_json(fields["outcome"]) == failure
    last = events(redis, sealed.job_id)[-1]
    assert isinstance(last, JobEnded)
    assert last.state is JobState.FAILED
    assert last.at == pytest.approx(time.time(), abs=5)
    assert redis.zscore(keys.LEASES, sealed.job_id) is None
    assert TTL < redis.ttl(keys.record(sealed.job_id)) == redis.ttl(keys.events(sealed.job_id)) <= DEAD_LETTER_TTL
    assert redis.zscore(keys.DEAD_LETTERS, sealed.job_id) == pytest.approx(last.at)
    assert 0 < redis.ttl(keys.idempotency("receipt-7")) <= TTL
    assert 0 < redis.ttl(result_key(sealed.job_id)) <= TTL


def test_settling_leaves_an_idempotency_key_that_a_later_job_took(
    store: LeaseStore, settlement: Settlement, redis: Redis
) -> None:
    sealed = a_job(idempotency_key="receipt-7")
    redis.set(keys.idempotency("receipt-7"), "another-job fingerprint")
    lease = claim(store, sealed)
    settlement.settle(lease, a_failure(lease))
    assert redis.ttl(keys.idempotency("receipt-7")) == -1


def test_settling_twice_by_the_same_holder_keeps_the_first_outcome(
    store: LeaseStore, settlement: Settlement, redis: Redis
) -> None:
    lease = claim(store, a_job())
    assert settlement.settle(lease, a_failure(lease, "first"))
    assert settlement.settle(lease, a_failure(lease, "again, because the answer got lost"))
    assert json.loads(record(redis, lease.job_id)["outcome"])["message"] == "first"
    assert sum(isinstance(event, JobEnded) for event in events(redis, lease.job_id)) == 1


@pytest.mark.parametrize("code", [ErrorCode.INTERNAL, ErrorCode.CANCELLED, ErrorCode.DEADLINE_EXCEEDED])
def test_the_attempt_that_ends_a_job_without_an_answer_is_in_its_history_too(
    store: LeaseStore, settlement: Settlement, redis: Redis, code: ErrorCode
) -> None:
    sealed = a_job()
    first = claim(store, sealed, "worker-1")
    store.retry(first, a_failure(first, "at first"), 0, None)
    last = claim(store, sealed, "worker-2")
    assert settlement.settle(last, a_failure(last, "at last").model_copy(update={"code": code}))

    fields = record(redis, sealed.job_id)
    attempts = [FailedAttempt.model_validate_json(fields[f"attempt:{number}"]) for number in (1, 2)]
    assert [(each.worker, each.stage, each.code, each.message) for each in attempts] == [
        ("worker-1", Stage.DECODE, ErrorCode.INTERNAL, "at first"),
        ("worker-2", Stage.DECODE, code, "at last"),
    ]
    moments = [last.claimed_at, float(fields["ended_at"])]
    assert [attempts[1].began_at, attempts[1].ended_at] == pytest.approx(moments, abs=1e-3, rel=0)


@pytest.mark.holds(
    "docs/reliability.md#promises",
    "Of its outcomes one is",
)
@pytest.mark.holds("docs/design.md#decisions", "that only the newest token may run")
def test_lost_lease_cannot_settle(brief: LeaseStore, settlement: Settlement, redis: Redis) -> None:
    sealed = a_job()
    frozen = claim(brief, sealed, "frozen")
    eventually(lambda: brief.due(keys.LEASES, 10))
    assert isinstance(brief.reap(sealed.job_id, "reaper"), Requeued)

    assert not settlement.settle(frozen, a_failure(frozen)), "requeued: the old token is worth nothing"
    second = claim(brief, sealed, "worker-2")
    assert second.attempt == 2
    assert not settlement.settle(frozen, a_failure(frozen))
    assert settlement.settle(second, a_failure(second, "the second's"))
    assert json.loads(record(redis, sealed.job_id)["outcome"])["message"] == "the second's"


def test_late_event_does_not_bring_an_expired_stream_back(store: LeaseStore, client: Redis, redis: Redis) -> None:
    lease = claim(store, a_job())
    redis.delete(keys.events(lease.job_id))
    AttemptEvents(EventWriter(client), lease).tell(StageStarted, stage=Stage.GENERATE)
    assert not redis.exists(keys.events(lease.job_id))


def late_failure(sealed: SealedJob) -> JobFailure:
    return JobFailure(
        job_id=sealed.job_id,
        code=ErrorCode.DEADLINE_EXCEEDED,
        message="over",
        stage=Stage.QUEUED,
        retryable=False,
        attempts=0,
    )


@pytest.mark.holds("docs/design.md#one-job-walked", "EXPIRED by its deadline, without ever running")
@pytest.mark.holds(
    "docs/operations.md#a-job-waits-and-waits-is-its-message-lost",
    "ends as EXPIRED although no worker took it",
    "Both need one living worker, busy or not.",
)
def test_deadline_of_a_job_that_waits_is_kept_without_a_worker(
    store: LeaseStore, settlement: Settlement, redis: Redis
) -> None:
    sealed = a_job(deadline_seconds=5, idempotency_key="k")
    sealed = sealed.model_copy(update={"submitted_at": time.time() - 6})
    publish(redis, sealed)
    redis.zadd(keys.DEADLINES, {sealed.job_id: time.time() - 1})
    redis.set(keys.idempotency("k"), f"{sealed.job_id} fingerprint")

    assert store.due(keys.DEADLINES, 10) == [sealed.job_id]
    assert settlement.expire(late_failure(sealed), sealed.job)
    assert not settlement.expire(late_failure(sealed), sealed.job), "once"
    fields = record(redis, sealed.job_id)
    assert fields["state"] == JobState.EXPIRED
    assert OUTCOME.validate_json(fields["outcome"]) == late_failure(sealed)
    assert [event.state for event in events(redis, sealed.job_id)] == [JobState.EXPIRED]
    assert store.due(keys.DEADLINES, 10) == []
    assert not redis.exists(keys.queued("normal"))
    kept = (keys.record(sealed.job_id), keys.events(sealed.job_id), keys.idempotency("k"))
    assert [redis.ttl(key) for key in kept] == [-1, -1, -1], "its message waits"
    assert store.claim(QueuedJob.of(sealed), "worker") == AlreadySettled(late_failure(sealed))
    assert all(0 < redis.ttl(key) <= TTL for key in kept)


@pytest.mark.parametrize("priority", Priority)
def test_job_that_ended_while_it_waited_is_let_go_once_its_message_is_lost(
    brief: LeaseStore, settlement: Settlement, redis: Redis, priority: Priority
) -> None:
    sealed = a_job(deadline_seconds=0.01, priority=priority, idempotency_key="k")
    publish(redis, sealed)
    redis.set(keys.idempotency("k"), f"{sealed.job_id} fingerprint")
    eventually(lambda: settlement.expire(late_failure(sealed), sealed.job))
    later = a_job(priority=priority)
    publish(redis, later)
    brief.sweep(10)
    kept = (keys.record(sealed.job_id), keys.events(sealed.job_id), keys.idempotency("k"))
    assert [redis.ttl(key) for key in kept] == [-1, -1, -1]
    claim(brief, later)

    eventually(lambda: brief.sweep(10) == ([], []) and not redis.exists(keys.unheard(priority)))
    assert all(0 < redis.ttl(key) <= TTL for key in kept)


def test_running_job_past_its_deadline_is_its_workers_to_end(
    store: LeaseStore, settlement: Settlement, redis: Redis
) -> None:
    sealed = a_job(deadline_seconds=5).model_copy(update={"submitted_at": time.time() - 6})
    publish(redis, sealed)
    redis.zadd(keys.DEADLINES, {sealed.job_id: time.time() - 1})
    lease = claim(store, sealed)
    assert not settlement.expire(late_failure(sealed), sealed.job)
    assert record(redis, sealed.job_id)["state"] == JobState.RUNNING
    assert store.due(keys.DEADLINES, 10) == [], "looked at again later, should the worker die"
    assert redis.zscore(keys.DEADLINES, sealed.job_id) > time.time()
    settlement.settle(lease, a_failure(lease))
    assert not redis.exists(keys.DEADLINES)


@pytest.mark.holds(
    "docs/design.md#decisions",
    "unless Celery is to call something afterwards, the acknowledgement of its message",
)
@pytest.mark.parametrize("canvas_json", [None, '{"callbacks": [{"task": "app.save"}]}'])
def test_message_is_acknowledged_with_the_outcome_unless_celery_is_to_call_something(
    store: LeaseStore, settlement: Settlement, redis: Redis, canvas_json: str | None
) -> None:
    sealed = a_job()
    lease = replace(claim(store, sealed), delivery_tag="its tag")
    if canvas_json is not None:
        redis.hset(keys.record(sealed.job_id), "canvas", canvas_json)
    redis.hset(UNACKED, mapping={"its tag": "its message", "another tag": "another's"})
    redis.zadd(UNACKED_INDEX, {"its tag": 1, "another tag": 2})
    assert settlement.settle(lease, a_failure(lease))
    kept = {"another tag"} if canvas_json is None else {"its tag", "another tag"}
    assert set(redis.hkeys(UNACKED)) == set(redis.zrange(UNACKED_INDEX, 0, -1)) == kept


@pytest.mark.holds(
    "docs/celery.md#go-on-with-the-answer-link-chain-group-chord",
    "What follows is called once",
)
@pytest.mark.parametrize("ended_by", ["its worker", "a reaper"])
def test_a_job_for_which_celery_is_to_call_something_is_published_until_that_is_done(
    store: LeaseStore, settlement: Settlement, redis: Redis, ended_by: str
) -> None:
    sealed = a_job(max_attempts=1)
    asked = Asked(canvas=Canvas(callbacks=({"task": "app.save"},)))
    queued = QueuedJob.of(sealed)
    lease = store.claim(replace(queued, record=asked.written_into(queued.record)), "worker-1")
    assert isinstance(lease, Claimed)
    if ended_by == "a reaper":
        redis.zadd(keys.LEASES, {sealed.job_id: 0})
        taken = store.reap(sealed.job_id, "reaper")
        assert isinstance(taken, TakenOver)
        lease = taken.lease
    assert settlement.settle(lease, a_failure(lease))
    assert messages(redis) == []
    # Whoever was to call it has died.
    redis.zadd(keys.LEASES, {sealed.job_id: 0})
    a_reaper(store).reap_overdue()
    assert messages(redis) == [sealed.job_id]
    answer = store.claim(queued, "worker-2")
    assert isinstance(answer, AlreadySettled)
    assert answer.canvas_json is not None
    assert "app.save" in answer.canvas_json
    store.canvas_is_called(sealed.job_id)
    assert redis.zscore(keys.LEASES, sealed.job_id) is None
    assert store.claim(queued, "worker-3") == AlreadySettled(a_failure(lease))
