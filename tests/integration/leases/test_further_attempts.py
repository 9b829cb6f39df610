"""Jobs that their holders give up: failed ones wait for their next attempt, those of a drain go first."""

import json

import pytest
from redis import Redis

from keye.config import keys
from keye.config.codes import ErrorCode, JobState, QueuedAgain, Stage
from keye.config.connection import connect
from keye.config.event import StageStarted
from keye.config.job import Priority
from keye.config.outcome import FailedAttempt
from keye.config.topology import message, message_list
from keye.config.wire import open_sealed
from keye.producer import Client
from keye.worker.leases.claims import Claimed, HeldElsewhere, QueuedJob, Requeued, Suspect, TakenOver
from keye.worker.leases.job_lease import LeaseStore
from keye.worker.results.event_writer import AttemptEvents, EventWriter
from keye.worker.results.settlement import Settlement
from tests.support.conditions import eventually
from tests.support.leased_jobs import a_failure, a_job, a_reaper, claim, events, messages, record


@pytest.mark.holds("docs/design.md#decisions", "waits in the same sorted set by the time it is due")
@pytest.mark.holds("docs/operations.md#which-failures-are-tried-again", "The job waits in Redis, not in a worker")
def test_failed_attempt_waits_in_redis_until_it_is_due(store: LeaseStore, redis: Redis) -> None:
    sealed = a_job()
    first = claim(store, sealed)
    assert store.retry(first, a_failure(first), pause_seconds=0.2, max_visual_tokens=70) == "queued"

    assert record(redis, sealed.job_id)["state"] == JobState.QUEUED
    assert store.claim(QueuedJob.of(sealed), "a stray message") == HeldElsewhere(), "not before it is due"
    assert store.reap(sealed.job_id, "too early") is None
    eventually(lambda: store.due(keys.LEASES, 10) == [sealed.job_id])
    requeued = store.reap(sealed.job_id, "reaper")
    assert isinstance(requeued, Requeued)
    assert requeued.dead_worker is None
    store.publish(requeued)

    second = claim(store, sealed, "worker-2")
    assert (second.attempt, second.max_visual_tokens) == (2, 70)
    moves = [(event.stage, event.reason) for event in events(redis, sealed.job_id)]
    assert moves == [(Stage.OPEN, None), (Stage.QUEUED, QueuedAgain.RETRY), (Stage.OPEN, None)]


def test_retry_that_waits_outlives_every_worker_and_is_not_begun_early(redis_url: str, redis: Redis) -> None:
    with connect(redis_url) as leaving:
        store = LeaseStore(leaving, lease_seconds=30)
        lease = claim(store, a_job())
        assert store.retry(lease, a_failure(lease), pause_seconds=0.5, max_visual_tokens=None) == "queued"
    due_at = float(record(redis, lease.job_id)["due_at"])
    with connect(redis_url) as arriving:
        reaper = a_reaper(LeaseStore(arriving, lease_seconds=1))
        reaper.start()
        eventually(lambda: messages(redis))
        reaper.stop()
    assert messages(redis) == [lease.job_id]
    assert redis.zscore(keys.queued("normal"), lease.job_id) >= due_at


def test_attempt_that_was_given_up_can_neither_settle_nor_be_queued_twice(
    store: LeaseStore, settlement: Settlement, redis: Redis
) -> None:
    lease = claim(store, a_job())
    assert store.retry(lease, a_failure(lease), 60, None) == "queued"
    before = record(redis, lease.job_id)
    assert store.retry(lease, a_failure(lease), 0, None) == "lost"
    assert not settlement.settle(lease, a_failure(lease))
    assert record(redis, lease.job_id) == before


def test_cancelled_job_gets_no_other_attempt(store: LeaseStore, settlement: Settlement, redis: Redis) -> None:
    lease = claim(store, a_job())
    redis.hset(keys.record(lease.job_id), "cancel_requested", "1")
    assert store.retry(lease, a_failure(lease), 60, None) == "cancelled"
    assert store.requeue([lease]) == ["cancelled"]
    assert settlement.settle(lease, a_failure(lease)), "it is still the holder's to end"


@pytest.mark.holds("docs/design.md#one-job-walked", "or gives the job back")
def test_job_given_back_is_due_at_once_and_the_attempt_does_not_count(
    store: LeaseStore, settlement: Settlement, redis: Redis
) -> None:
    sealed = a_job()
    first = claim(store, sealed)
    assert store.requeue([first]) == ["queued"]
    assert store.requeue([first]) == ["lost"]
    assert not settlement.settle(first, a_failure(first))

    assert messages(redis) == [sealed.job_id]
    assert events(redis, sealed.job_id)[-1].reason is QueuedAgain.GIVEN_BACK
    second = claim(store, sealed, "worker-2")
    assert second.attempt == 2
    assert second.max_attempts == first.max_attempts + 1


def test_job_that_met_a_fault_of_a_fit_host_runs_alone_from_then_on(store: LeaseStore, redis: Redis) -> None:
    sealed = a_job()
    met = json.dumps({"stage": "fetch", "message": "the disk is full"})
    assert store.requeue([claim(store, sealed)], met) == ["queued"]
    assert store.requeue([claim(store, sealed)], met, "host-1:gpu0") == ["queued"]
    assert isinstance(store.claim(QueuedJob.of(sealed), "worker-2"), Suspect)

    third = claim(store, sealed, "worker-2", is_alone=True)
    assert (third.attempt, third.host_faults, third.is_alone) == (3, {"host-1:gpu0": 1}, True)
    assert store.requeue([third], met, "host-2:gpu0") == ["queued"]
    assert claim(store, sealed, is_alone=True).host_faults == {"host-1:gpu0": 1, "host-2:gpu0": 1}
    noted = [json.loads(record(redis, sealed.job_id)[f"attempt:{n}"]) for n in (1, 2, 3)]
    assert [(each["code"], each["stage"], each["message"]) for each in noted] == [
        ("HOST_FAULT", "fetch", "the disk is full")
    ] * 3


def test_jobs_given_back_are_the_next_to_be_taken_in_their_old_order(store: LeaseStore, redis: Redis) -> None:
    waiting = a_job()
    leases = [claim(store, a_job()) for _ in range(3)]
    redis.lpush(message_list(Priority.NORMAL), message(waiting.job_id, None, Priority.NORMAL))
    urgent = claim(store, a_job(priority="high"))

    assert store.requeue([leases[2], urgent, leases[0], leases[1]]) == ["queued"] * 4
    assert messages(redis) == [*(lease.job_id for lease in leases), waiting.job_id]
    assert messages(redis, Priority.HIGH) == [urgent.job_id]
    assert store.sweep(10) == ([], []), "nothing that they overtook seems lost"


def test_jobs_are_given_back_whatever_lies_at_the_head_of_the_queue(store: LeaseStore, redis: Redis) -> None:
    lease = claim(store, a_job())
    # The key of its record would be that of another type.
    redis.rpush(message_list(Priority.NORMAL), "[]", f'"id": "{lease.job_id}:events"')
    assert store.requeue([lease]) == ["queued"]
    assert json.loads(redis.lindex(message_list(Priority.NORMAL), -1))["headers"]["id"] == lease.job_id


@pytest.mark.holds(
    "docs/reliability.md#promises",
    "Jobs that outlast `KEYE_DRAIN_SECONDS` go",
)
def test_jobs_given_back_by_several_workers_come_back_in_the_order_of_the_queue(
    store: LeaseStore, redis: Redis, redis_url: str
) -> None:
    def claimed(job_id: str) -> Claimed:
        return claim(store, open_sealed(json.loads(record(redis, job_id)["sealed"])))

    with Client(redis_url) as client:
        ids = [client.submit(prompt="?", priority="normal" if number % 5 else "high").id for number in range(12)]
        # Their workers' threads claim them in any order.
        leases = {job_id: claimed(job_id) for job_id in reversed(ids)}
        for job_id in ids[6:8]:
            store.requeue([leases[job_id]])
            leases[job_id] = claimed(job_id)
        for priority in Priority:
            redis.delete(message_list(priority))
        retried = leases.pop(ids[1])
        store.retry(retried, a_failure(retried), 0, None)
        a_reaper(store).reap_overdue()
        waiting = client.submit(prompt="?").id
    given_back = list(leases)[::-1]
    # As several workers do, and those whose claim was under way when they ended.
    for together in (given_back[1::3], given_back[:1], given_back[2::3], given_back[3::3]):
        assert store.requeue([leases[job_id] for job_id in together]) == ["queued"] * len(together)
    urgent = [ids[0], ids[5], ids[10]]
    assert messages(redis, Priority.HIGH) == urgent
    assert messages(redis) == [*(each for each in given_back if each not in urgent), retried.job_id, waiting]


@pytest.mark.holds(
    "docs/operations.md#redis-is-full-what-must-i-do",
    "a job whose message was under way starts after two leases",
)
def test_job_given_back_to_nobody_is_published_again_after_two_leases(brief: LeaseStore, redis: Redis) -> None:
    lease = claim(brief, a_job())
    brief.requeue([lease])
    redis.delete(message_list(Priority.NORMAL))
    eventually(lambda: brief.due(keys.LEASES, 10) == [lease.job_id])
    a_reaper(brief).reap_overdue()
    assert messages(redis) == [lease.job_id]


@pytest.mark.holds(
    "docs/operations.md#which-failures-are-tried-again",
    "shows each attempt without an answer, the last too",
)
def test_every_failed_attempt_is_kept_with_its_worker_stage_and_reason(
    brief: LeaseStore, client: Redis, redis: Redis
) -> None:
    sealed = a_job(max_attempts=3)
    AttemptEvents(EventWriter(client), claim(brief, sealed, "dies")).tell(StageStarted, stage=Stage.DECODE)
    eventually(lambda: brief.due(keys.LEASES, 10))
    brief.reap(sealed.job_id, "reaper")
    second = claim(brief, sealed, "fails")
    brief.retry(second, a_failure(second, "it broke"), 0, None)
    assert isinstance(brief.claim(QueuedJob.of(sealed), "dies too", is_alone=True), Claimed)
    eventually(lambda: brief.due(keys.LEASES, 10))
    assert isinstance(brief.reap(sealed.job_id, "reaper"), TakenOver)

    fields = record(redis, sealed.job_id)
    attempts = [FailedAttempt.model_validate_json(fields[f"attempt:{number}"]) for number in (1, 2, 3)]
    assert [(a.attempt, a.worker, a.stage, a.code) for a in attempts] == [
        (1, "dies", Stage.DECODE, ErrorCode.WORKER_LOST),
        (2, "fails", Stage.DECODE, ErrorCode.INTERNAL),
        (3, "dies too", Stage.OPEN, ErrorCode.WORKER_LOST),
    ]
    assert attempts[1].message == "it broke"
    times = [moment for attempt in attempts for moment in (attempt.began_at, attempt.ended_at)]
    assert times == sorted(times)


@pytest.mark.holds(
    "docs/operations.md#which-failures-are-tried-again",
    "They cost none of the three attempts that workers' deaths and `OUT_OF_MEMORY` may take.",
)
def test_unreachable_media_use_up_no_attempt_that_a_death_may_take(brief: LeaseStore, redis: Redis) -> None:
    sealed = a_job()
    for number in range(7):
        lease = claim(brief, sealed)
        away = a_failure(lease).model_copy(update={"code": ErrorCode.MEDIA_UNREACHABLE})
        assert lease.num_unreachable == number
        brief.retry(lease, away, 0, None, counts=False)
    first = FailedAttempt.model_validate_json(record(redis, sealed.job_id)["attempt:1"])
    assert claim(brief, sealed).unreachable_since == pytest.approx(first.ended_at, abs=1e-3)
    for is_last in (False, False, True):
        eventually(lambda: brief.due(keys.LEASES, 10))
        reaped = brief.reap(sealed.job_id, "reaper")
        assert isinstance(reaped, TakenOver if is_last else Requeued)
        if not is_last:
            assert isinstance(brief.claim(QueuedJob.of(sealed), "dies too", is_alone=True), Claimed)


def test_record_of_a_job_that_is_tried_for_days_does_not_grow_for_days(store: LeaseStore, redis: Redis) -> None:
    sealed = a_job()
    for _ in range(60):
        lease = claim(store, sealed)
        store.retry(lease, a_failure(lease), 0, None, counts=False)
    kept = sorted(int(name[8:]) for name in record(redis, sealed.job_id) if name.startswith("attempt:"))
    assert kept == list(range(11, 61))


def test_publishing_after_a_failed_attempt_does_not_cost_the_next(store: LeaseStore, redis: Redis) -> None:
    sealed = a_job()
    redis.hset(keys.record(sealed.job_id), mapping=sealed.record)
    lease = claim(store, sealed)
    assert store.retry(lease, a_failure(lease), 0.1, None) == "queued"
    store.publish(Requeued(sealed.job_id, "", None, "normal", "0"))
    eventually(lambda: store.due(keys.LEASES, 10) == [sealed.job_id])
