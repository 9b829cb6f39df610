"""Claims, renewals, settlements and reaping on a real server: one outcome per job, whoever dies and whenever."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from config import keys
from config.error_codes import ErrorCode
from config.event import EVENT, JobEnded, Stage
from config.history import FailedAttempt
from config.job import AnalysisJob, Priority
from config.outcome import OUTCOME, JobFailure
from config.state import JobState
from config.topology import message, message_list
from config.wire import SealedJob, seal
from tests.conditions import eventually
from worker.leases.connection import connect
from worker.leases.job_lease import (
    AlreadySettled,
    Claimed,
    HeldElsewhere,
    LateJob,
    LeaseStore,
    QueuedJob,
    Renewal,
    Requeued,
    Suspect,
    TakenOver,
)
from worker.leases.reaper import Reaper
from worker.leases.renewal import LeaseRenewal
from worker.results.event_writer import AttemptEvents, EventWriter
from worker.results.settlement import Settlement

TTL = 3600
DEAD_LETTER_TTL = 9000
BRIEF_LEASE_SECONDS = 0.3


@pytest.fixture
def client(redis_url: str) -> Iterator[Redis]:
    with connect(redis_url) as client:
        yield client


@pytest.fixture
def store(client: Redis) -> LeaseStore:
    return LeaseStore(client, lease_seconds=30)


@pytest.fixture
def brief(client: Redis) -> LeaseStore:
    """A store whose leases end while a test waits."""
    return LeaseStore(client, BRIEF_LEASE_SECONDS)


@pytest.fixture
def settlement(client: Redis) -> Settlement:
    return Settlement(client, TTL, DEAD_LETTER_TTL)


def a_job(**options: object) -> SealedJob:
    return seal(AnalysisJob.model_validate({"prompt": "what is it?", **options}))


def claim(store: LeaseStore, sealed: SealedJob, worker: str = "worker-1") -> Claimed:
    claimed = store.claim(QueuedJob.of(sealed), worker)
    assert isinstance(claimed, Claimed)
    return claimed


def a_failure(lease: Claimed, message: str = "it broke") -> JobFailure:
    return JobFailure(
        job_id=lease.job_id,
        code=ErrorCode.INTERNAL,
        message=message,
        stage=Stage.DECODE,
        retryable=True,
        attempts=lease.attempt,
    )


def record(redis: Redis, job_id: str) -> dict[str, str]:
    return redis.hgetall(keys.record(job_id))


def events(redis: Redis, job_id: str) -> list[object]:
    return [EVENT.validate_json(fields["event"]) for _, fields in redis.xrange(keys.events(job_id))]


def messages(redis: Redis, priority: Priority = Priority.NORMAL) -> list[str]:
    """Job ids in the order in which a worker takes them."""
    raw = redis.lrange(message_list(priority), 0, -1)
    return [json.loads(text)["headers"]["id"] for text in reversed(raw)]


def a_reaper(store: LeaseStore, expire: Callable[[LateJob], None] = lambda late: None) -> Reaper:
    return Reaper(store, "reaper", deliver=lambda: None, bury=lambda taken: None, expire=expire)


def test_first_claim_of_a_job_without_record_writes_the_record(store: LeaseStore, redis: Redis) -> None:
    sealed = a_job(deadline_seconds=60, max_attempts=2, priority="high")
    claimed = claim(store, sealed)

    assert claimed.attempt == 1
    assert claimed.seconds_to_deadline == pytest.approx(60, abs=2)
    fields = record(redis, sealed.job_id)
    assert fields["state"] == JobState.RUNNING
    assert fields["worker"] == "worker-1"
    assert fields["priority"] == "high"
    assert fields["max_attempts"] == "2"
    assert SealedJob.model_validate_json(fields["sealed"]) == sealed
    assert redis.ttl(keys.record(sealed.job_id)) == -1, "an unsettled job must not expire"
    assert [event.stage for event in events(redis, sealed.job_id)] == [Stage.OPEN]


def test_claim_keeps_the_record_that_the_producer_wrote(store: LeaseStore, redis: Redis) -> None:
    sealed = a_job()
    redis.hset(
        keys.record(sealed.job_id),
        mapping={"state": "QUEUED", "sealed": "as sent", "attempts": 0, "max_attempts": 7, "submitted_at": 12.5},
    )
    claimed = claim(store, sealed)

    assert claimed.submitted_at == 12.5
    assert record(redis, sealed.job_id)["sealed"] == "as sent"
    assert record(redis, sealed.job_id)["max_attempts"] == "7"


def test_of_many_claimers_at_once_exactly_one_wins(store: LeaseStore) -> None:
    job = QueuedJob.of(a_job())
    answers: list[object] = []
    gate = threading.Barrier(16)

    def contend(name: str) -> None:
        gate.wait()
        answers.append(store.claim(job, name))

    threads = [threading.Thread(target=contend, args=(f"worker-{i}",)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sum(isinstance(answer, Claimed) for answer in answers) == 1
    assert sum(isinstance(answer, HeldElsewhere) for answer in answers) == 15


class LosesItsFirstAnswer(Redis):
    """A client whose connection breaks after the server has run its first script."""

    has_lost = False

    def evalsha(self, *args: Any) -> Any:
        answer = super().evalsha(*args)
        if not self.has_lost:
            self.has_lost = True
            raise RedisConnectionError("broken before the answer came")
        return answer


def test_claim_whose_answer_got_lost_holds_the_job_as_its_first_attempt(redis_url: str, redis: Redis) -> None:
    with LosesItsFirstAnswer.from_url(redis_url, decode_responses=True) as client:
        lease = claim(LeaseStore(client, lease_seconds=30), a_job())
    assert client.has_lost
    assert lease.attempt == 1
    assert record(redis, lease.job_id)["attempts"] == "1"
    assert [event.stage for event in events(redis, lease.job_id)] == [Stage.OPEN]


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
    assert redis.zscore(keys.leases(), sealed.job_id) is None
    assert TTL < redis.ttl(keys.record(sealed.job_id)) == redis.ttl(keys.events(sealed.job_id)) <= DEAD_LETTER_TTL
    assert redis.zscore(keys.dead_letters(), sealed.job_id) == pytest.approx(last.at)
    assert 0 < redis.ttl(keys.idempotency("receipt-7")) <= TTL


def test_settling_leaves_an_idempotency_key_that_a_later_job_took(
    store: LeaseStore, settlement: Settlement, redis: Redis
) -> None:
    sealed = a_job(idempotency_key="receipt-7")
    redis.set(keys.idempotency("receipt-7"), "another-job fingerprint")
    lease = claim(store, sealed)
    settlement.settle(lease, a_failure(lease))
    assert redis.ttl(keys.idempotency("receipt-7")) == -1


def test_redelivery_after_settling_finds_the_outcome(store: LeaseStore, settlement: Settlement) -> None:
    sealed = a_job()
    lease = claim(store, sealed)
    settlement.settle(lease, a_failure(lease))
    assert store.claim(QueuedJob.of(sealed), "worker-2") == AlreadySettled(a_failure(lease))


def test_settling_twice_by_the_same_holder_keeps_the_first_outcome(
    store: LeaseStore, settlement: Settlement, redis: Redis
) -> None:
    lease = claim(store, a_job())
    assert settlement.settle(lease, a_failure(lease, "first"))
    assert settlement.settle(lease, a_failure(lease, "again, because the answer got lost"))
    assert json.loads(record(redis, lease.job_id)["outcome"])["message"] == "first"
    assert sum(isinstance(event, JobEnded) for event in events(redis, lease.job_id)) == 1


def test_lost_lease_cannot_settle(brief: LeaseStore, settlement: Settlement, redis: Redis) -> None:
    sealed = a_job()
    frozen = claim(brief, sealed, "frozen")
    eventually(lambda: brief.overdue(10))
    assert isinstance(brief.reap(sealed.job_id, "reaper"), Requeued)

    assert not settlement.settle(frozen, a_failure(frozen)), "requeued: the old token is worth nothing"
    second = claim(brief, sealed, "worker-2")
    assert second.attempt == 2
    assert not settlement.settle(frozen, a_failure(frozen))
    assert settlement.settle(second, a_failure(second, "the second's"))
    assert json.loads(record(redis, sealed.job_id)["outcome"])["message"] == "the second's"


def test_renewed_lease_is_not_overdue(brief: LeaseStore) -> None:
    lease = claim(brief, a_job())
    ends_at = time.monotonic() + 3 * BRIEF_LEASE_SECONDS
    while time.monotonic() < ends_at:
        assert brief.renew([lease]) == ["renewed"]
        assert brief.overdue(10) == []
        time.sleep(BRIEF_LEASE_SECONDS / 10)
    eventually(lambda: brief.overdue(10) == [lease.job_id])


def test_reaper_leaves_a_lease_that_was_renewed_after_it_looked(brief: LeaseStore, redis: Redis) -> None:
    lease = claim(brief, a_job())
    eventually(lambda: brief.overdue(10))
    assert brief.renew([lease]) == ["renewed"]
    assert brief.reap(lease.job_id, "reaper") is None
    assert record(redis, lease.job_id)["state"] == JobState.RUNNING


def test_job_of_a_dead_worker_is_queued_again_and_published(brief: LeaseStore, redis: Redis) -> None:
    sealed = a_job()
    claim(brief, sealed, "dead")
    reaper = a_reaper(brief)
    reaper.start()
    eventually(lambda: messages(redis))
    reaper.stop()

    assert messages(redis) == [sealed.job_id]
    told = FailedAttempt.model_validate_json(record(redis, sealed.job_id)["attempt:1"])
    assert (told.worker, told.code) == ("dead", ErrorCode.WORKER_LOST)
    assert record(redis, sealed.job_id)["state"] == JobState.QUEUED
    assert redis.zcard(keys.leases()) == 0
    assert [event.stage for event in events(redis, sealed.job_id)] == [Stage.OPEN, Stage.QUEUED]


def test_requeued_job_whose_message_was_not_published_is_reaped_again(brief: LeaseStore) -> None:
    sealed = a_job()
    claim(brief, sealed, "dead")
    eventually(lambda: brief.overdue(10))
    assert isinstance(brief.reap(sealed.job_id, "this reaper dies before it publishes"), Requeued)

    eventually(lambda: brief.overdue(10))
    requeued = brief.reap(sealed.job_id, "the next reaper")
    assert isinstance(requeued, Requeued)
    brief.publish(requeued)
    assert brief.redis.zcard(keys.leases()) == 0
    assert claim(brief, sealed).attempt == 2, "being queued twice is no attempt"


def test_publishing_too_late_does_not_end_the_next_lease(brief: LeaseStore, redis: Redis) -> None:
    sealed = a_job()
    claim(brief, sealed, "dead")
    eventually(lambda: brief.overdue(10))
    requeued = brief.reap(sealed.job_id, "reaper")
    assert isinstance(requeued, Requeued)
    claim(brief, sealed, "faster than the message")
    brief.publish(requeued)
    assert messages(redis) == []
    eventually(lambda: brief.overdue(10) == [sealed.job_id])


def test_job_whose_attempts_are_used_up_is_taken_over_and_settled_once(
    brief: LeaseStore, settlement: Settlement, redis: Redis
) -> None:
    sealed = a_job(max_attempts=1)
    dead = claim(brief, sealed, "dead")
    eventually(lambda: brief.overdue(10))
    taken = brief.reap(sealed.job_id, "reaper")
    assert isinstance(taken, TakenOver)
    assert taken.lease.attempt == 1
    assert not taken.cancel_requested

    assert not settlement.settle(dead, a_failure(dead, "late"))
    assert settlement.settle(taken.lease, a_failure(taken.lease, "buried"))
    assert json.loads(record(redis, sealed.job_id)["outcome"])["message"] == "buried"


def test_job_whose_reaper_died_too_is_taken_over_again(brief: LeaseStore) -> None:
    sealed = a_job(max_attempts=1)
    claim(brief, sealed, "dead")
    eventually(lambda: brief.overdue(10))
    assert isinstance(brief.reap(sealed.job_id, "dies too"), TakenOver)
    assert brief.reap(sealed.job_id, "too early") is None
    eventually(lambda: brief.overdue(10))
    assert isinstance(brief.reap(sealed.job_id, "lives"), TakenOver)


def test_cancelled_job_of_a_dead_worker_does_not_run_again(brief: LeaseStore, redis: Redis) -> None:
    sealed = a_job(max_attempts=3)
    claim(brief, sealed, "dead")
    redis.hset(keys.record(sealed.job_id), "cancel_requested", "1")
    eventually(lambda: brief.overdue(10))
    taken = brief.reap(sealed.job_id, "reaper")
    assert isinstance(taken, TakenOver)
    assert taken.cancel_requested


def test_of_several_reapers_each_job_is_published_once(brief: LeaseStore, redis: Redis) -> None:
    jobs = [a_job() for _ in range(20)]
    for sealed in jobs:
        claim(brief, sealed, "dead")
    reapers = [a_reaper(brief) for _ in range(3)]
    for reaper in reapers:
        reaper.start()
    eventually(lambda: brief.redis.zcard(keys.leases()) == 0)
    for reaper in reapers:
        reaper.stop()
    assert sorted(messages(redis)) == sorted(sealed.job_id for sealed in jobs)


def test_jobs_that_cannot_be_looked_after_hold_up_nobody(
    brief: LeaseStore, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    redis.set(keys.record("no-hash"), "of another kind")
    redis.hset(keys.record("odd"), mapping={"state": "QUEUED", "priority": "whenever"})
    overdue = time.time() - 100
    redis.zadd(keys.leases(), {"no-hash": overdue, "odd": overdue})
    redis.zadd(keys.deadlines(), {"no-hash": overdue, "late": overdue})
    lost = a_job()
    claim(brief, lost)
    eventually(lambda: lost.job_id in brief.overdue(10))
    expired: list[str] = []
    reaper = a_reaper(brief, expire=lambda late: expired.append(late.job_id))
    for _ in range(2):
        reaper.look_around()

    assert messages(redis) == [lost.job_id]
    assert "late" in expired
    told = [line for line in caplog.messages if "cannot be looked after" in line]
    assert len(told) == 3, "once a lease, not at every look"
    eventually(lambda: {"no-hash", "odd"} <= set(brief.overdue(10)))


def test_renewal_keeps_what_is_held_and_lets_go_of_the_rest(brief: LeaseStore, redis: Redis) -> None:
    renewal = LeaseRenewal(brief)
    renewal.start()
    held, left = claim(brief, a_job()), claim(brief, a_job())
    with renewal.holding(held, lambda reason: None):
        eventually(lambda: brief.overdue(10) == [left.job_id])
    eventually(lambda: len(brief.overdue(10)) == 2)
    renewal.stop()


def test_holder_is_told_once_that_its_lease_is_lost(brief: LeaseStore, redis: Redis) -> None:
    renewal = LeaseRenewal(brief)
    told: list[Renewal] = []
    lease = claim(brief, a_job())
    with renewal.holding(lease, told.append):
        redis.hset(keys.record(lease.job_id), "token", "another's")
        renewal.renew_all()
        renewal.renew_all()
    assert told == ["lost"]


def test_holder_is_told_that_the_caller_cancels_and_keeps_the_lease(brief: LeaseStore, redis: Redis) -> None:
    renewal = LeaseRenewal(brief)
    told: list[Renewal] = []
    lease = claim(brief, a_job())
    with renewal.holding(lease, told.append):
        redis.hset(keys.record(lease.job_id), "cancel_requested", "1")
        eventually(lambda: brief.overdue(10))
        renewal.renew_all()
        assert told == ["cancelled"]
        assert brief.overdue(10) == []


def test_a_cancel_that_is_heard_between_claim_and_holding_is_told_at_once(client: Redis, redis: Redis) -> None:
    patient = LeaseStore(client, 900)
    renewal = LeaseRenewal(patient)
    renewal.start()
    told: list[Renewal] = []
    lease = claim(patient, a_job())
    redis.hset(keys.record(lease.job_id), "cancel_requested", "1")
    renewal.hurry(lease.job_id)
    with renewal.holding(lease, told.append):
        eventually(lambda: told == ["cancelled"])
    renewal.stop()


@pytest.mark.parametrize(
    ("say", "stage"),
    [
        (lambda said: said.stage(Stage.PREPARE), Stage.PREPARE),
        (lambda said: said.frames(0, 1, 9), Stage.DECODE),
        (lambda said: said.text("answer", "a", 0, 1), Stage.GENERATE),
    ],
)
def test_the_stage_a_worker_died_in_is_known_from_its_last_words(
    brief: LeaseStore, client: Redis, say: Callable[[AttemptEvents], bool], stage: Stage
) -> None:
    lease = claim(brief, a_job(max_attempts=1))
    assert say(AttemptEvents(EventWriter(client), lease))
    eventually(lambda: brief.overdue(10))
    taken = brief.reap(lease.job_id, "reaper")
    assert isinstance(taken, TakenOver)
    assert taken.stage is stage


def test_stage_events_lie_between_claim_and_end(
    store: LeaseStore, settlement: Settlement, client: Redis, redis: Redis
) -> None:
    lease = claim(store, a_job())
    said = AttemptEvents(EventWriter(client), lease)
    said.stage(Stage.FETCH)
    said.stage(Stage.GENERATE)
    settlement.settle(lease, a_failure(lease))
    *stages, last = events(redis, lease.job_id)
    assert [event.stage for event in stages] == [Stage.OPEN, Stage.FETCH, Stage.GENERATE]
    assert isinstance(last, JobEnded)


def test_late_event_does_not_bring_an_expired_stream_back(store: LeaseStore, client: Redis, redis: Redis) -> None:
    lease = claim(store, a_job())
    redis.delete(keys.events(lease.job_id))
    AttemptEvents(EventWriter(client), lease).stage(Stage.GENERATE)
    assert not redis.exists(keys.events(lease.job_id))


def test_failed_attempt_waits_in_redis_until_it_is_due(store: LeaseStore, redis: Redis) -> None:
    sealed = a_job()
    first = claim(store, sealed)
    assert store.retry(first, a_failure(first), pause_seconds=0.2, max_visual_tokens=70) == "queued"

    assert record(redis, sealed.job_id)["state"] == JobState.QUEUED
    assert store.claim(QueuedJob.of(sealed), "a stray message") == HeldElsewhere(), "not before it is due"
    assert store.reap(sealed.job_id, "too early") is None
    eventually(lambda: store.overdue(10) == [sealed.job_id])
    requeued = store.reap(sealed.job_id, "reaper")
    assert isinstance(requeued, Requeued)
    assert requeued.dead_worker is None
    store.publish(requeued)

    second = claim(store, sealed, "worker-2")
    assert (second.attempt, second.max_visual_tokens) == (2, 70)
    assert [event.stage for event in events(redis, sealed.job_id)] == [Stage.OPEN, Stage.QUEUED, Stage.OPEN]


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
    assert store.give_back([lease]) == ["cancelled"]
    assert settlement.settle(lease, a_failure(lease)), "it is still the holder's to end"


def test_job_given_back_is_due_at_once_and_the_attempt_does_not_count(
    store: LeaseStore, settlement: Settlement, redis: Redis
) -> None:
    sealed = a_job()
    first = claim(store, sealed)
    assert store.give_back([first]) == ["queued"]
    assert store.give_back([first]) == ["lost"]
    assert not settlement.settle(first, a_failure(first))

    assert messages(redis) == [sealed.job_id]
    second = claim(store, sealed, "worker-2")
    assert second.attempt == 2
    assert second.max_attempts == first.max_attempts + 1


def test_jobs_given_back_are_the_next_to_be_taken_in_their_old_order(store: LeaseStore, redis: Redis) -> None:
    waiting = a_job()
    leases = [claim(store, a_job()) for _ in range(3)]
    redis.lpush(message_list(Priority.NORMAL), message(waiting.job_id, None, Priority.NORMAL))
    urgent = claim(store, a_job(priority="high"))

    assert store.give_back([leases[2], urgent, leases[0], leases[1]]) == ["queued"] * 4
    assert messages(redis) == [*(lease.job_id for lease in leases), waiting.job_id]
    assert messages(redis, Priority.HIGH) == [urgent.job_id]
    assert store.sweep(10) == [], "nothing that they overtook seems lost"


def test_job_given_back_to_nobody_is_published_again_after_two_leases(brief: LeaseStore, redis: Redis) -> None:
    lease = claim(brief, a_job())
    brief.give_back([lease])
    redis.delete(message_list(Priority.NORMAL))
    eventually(lambda: brief.overdue(10) == [lease.job_id])
    a_reaper(brief).reap_overdue()
    assert messages(redis) == [lease.job_id]


def test_every_failed_attempt_is_kept_with_its_worker_stage_and_reason(
    brief: LeaseStore, client: Redis, redis: Redis
) -> None:
    sealed = a_job(max_attempts=3)
    AttemptEvents(EventWriter(client), claim(brief, sealed, "dies")).stage(Stage.FETCH)
    eventually(lambda: brief.overdue(10))
    brief.reap(sealed.job_id, "reaper")
    second = claim(brief, sealed, "fails")
    brief.retry(second, a_failure(second, "it broke"), 0, None)
    assert isinstance(brief.claim(QueuedJob.of(sealed), "dies too", is_alone=True), Claimed)
    eventually(lambda: brief.overdue(10))
    assert isinstance(brief.reap(sealed.job_id, "reaper"), TakenOver)

    fields = record(redis, sealed.job_id)
    attempts = [FailedAttempt.model_validate_json(fields[f"attempt:{number}"]) for number in (1, 2, 3)]
    assert [(a.attempt, a.worker, a.stage, a.code) for a in attempts] == [
        (1, "dies", Stage.FETCH, ErrorCode.WORKER_LOST),
        (2, "fails", Stage.DECODE, ErrorCode.INTERNAL),
        (3, "dies too", Stage.OPEN, ErrorCode.WORKER_LOST),
    ]
    assert attempts[1].message == "it broke"
    times = [moment for attempt in attempts for moment in (attempt.began_at, attempt.ended_at)]
    assert times == sorted(times)


def publish(redis: Redis, sealed: SealedJob, at: float | None = None) -> None:
    """What the producer leaves behind once its message is out."""
    redis.hset(keys.record(sealed.job_id), mapping=sealed.record)
    redis.zadd(keys.queued(sealed.job.priority), {sealed.job_id: time.time() if at is None else at})
    redis.lpush(message_list(sealed.job.priority), sealed.job_id)


def test_job_whose_message_was_lost_is_published_again(store: LeaseStore, redis: Redis) -> None:
    lost, taken, waiting = a_job(), a_job(), a_job()
    publish(redis, lost, time.time() - 200)
    publish(redis, taken, time.time() - 100)
    publish(redis, waiting, time.time() - 90)
    claim(store, taken)
    redis.delete(message_list(Priority.NORMAL))
    redis.lpush(message_list(Priority.NORMAL), message(waiting.job_id, None, Priority.NORMAL))
    reaper = a_reaper(store)
    reaper.look_around()
    reaper.look_around()

    assert messages(redis) == [waiting.job_id, lost.job_id], "once, and nobody who only waits"
    assert redis.zscore(keys.queued("normal"), lost.job_id) == pytest.approx(time.time(), abs=5)
    assert claim(store, lost).attempt == 1


def test_queues_of_other_priorities_say_nothing_about_a_message(store: LeaseStore, redis: Redis) -> None:
    patient, urgent = a_job(priority="low"), a_job(priority="high")
    publish(redis, patient, time.time() - 200)
    publish(redis, urgent, time.time() - 100)
    claim(store, urgent)
    assert store.sweep(10) == []


def test_last_message_is_missed_when_there_are_none_left(store: LeaseStore, redis: Redis) -> None:
    sealed, fresh = a_job(), a_job()
    publish(redis, sealed, time.time() - 200)
    publish(redis, fresh)
    assert store.sweep(10) == [], "nothing was taken yet"
    redis.delete(message_list(Priority.NORMAL))
    assert store.sweep(10) == [sealed.job_id], "the fresh one's may be on its way"


def test_a_job_with_two_messages_makes_no_other_seem_lost(brief: LeaseStore, redis: Redis) -> None:
    twice, patient = a_job(), a_job()
    publish(redis, twice, time.time() - 200)
    publish(redis, patient, time.time() - 100)
    redis.zadd(keys.leases(), {twice.job_id: time.time() - 1})
    a_reaper(brief).reap_overdue()
    claim(brief, twice)
    assert brief.sweep(10) == []


def test_publishing_after_a_failed_attempt_does_not_cost_the_next(store: LeaseStore, redis: Redis) -> None:
    sealed = a_job()
    redis.hset(keys.record(sealed.job_id), mapping=sealed.record)
    lease = claim(store, sealed)
    assert store.retry(lease, a_failure(lease), 0.1, None) == "queued"
    store.publish(Requeued(sealed.job_id, "", None, "normal", "0"))
    eventually(lambda: store.overdue(10) == [sealed.job_id])


def late_failure(sealed: SealedJob) -> JobFailure:
    return JobFailure(
        job_id=sealed.job_id,
        code=ErrorCode.DEADLINE_EXCEEDED,
        message="over",
        stage=Stage.QUEUED,
        retryable=False,
        attempts=0,
    )


def test_deadline_of_a_job_that_waits_is_kept_without_a_worker(
    store: LeaseStore, settlement: Settlement, redis: Redis
) -> None:
    sealed = a_job(deadline_seconds=5, idempotency_key="k")
    sealed = sealed.model_copy(update={"submitted_at": time.time() - 6})
    publish(redis, sealed)
    redis.zadd(keys.deadlines(), {sealed.job_id: time.time() - 1})
    redis.set(keys.idempotency("k"), f"{sealed.job_id} fingerprint")

    assert store.late(10) == [sealed.job_id]
    assert settlement.expire(late_failure(sealed), sealed.job)
    assert not settlement.expire(late_failure(sealed), sealed.job), "once"
    fields = record(redis, sealed.job_id)
    assert fields["state"] == JobState.EXPIRED
    assert OUTCOME.validate_json(fields["outcome"]) == late_failure(sealed)
    assert [event.state for event in events(redis, sealed.job_id)] == [JobState.EXPIRED]
    assert store.late(10) == []
    assert not redis.exists(keys.queued("normal"))
    for key in (keys.record(sealed.job_id), keys.events(sealed.job_id), keys.idempotency("k")):
        assert 0 < redis.ttl(key) <= TTL


def test_running_job_past_its_deadline_is_its_workers_to_end(
    store: LeaseStore, settlement: Settlement, redis: Redis
) -> None:
    sealed = a_job(deadline_seconds=5).model_copy(update={"submitted_at": time.time() - 6})
    publish(redis, sealed)
    redis.zadd(keys.deadlines(), {sealed.job_id: time.time() - 1})
    lease = claim(store, sealed)
    assert not settlement.expire(late_failure(sealed), sealed.job)
    assert record(redis, sealed.job_id)["state"] == JobState.RUNNING
    assert store.late(10) == [], "looked at again later, should the worker die"
    assert redis.zscore(keys.deadlines(), sealed.job_id) > time.time()
    settlement.settle(lease, a_failure(lease))
    assert not redis.exists(keys.deadlines())


def die_under(brief: LeaseStore, sealed: SealedJob, is_alone: bool = False) -> Requeued | TakenOver | None:
    assert isinstance(brief.claim(QueuedJob.of(sealed), "dies", is_alone), Claimed)
    eventually(lambda: sealed.job_id in brief.overdue(10))
    return brief.reap(sealed.job_id, "reaper")


def test_job_whose_workers_died_twice_is_claimed_only_by_who_runs_it_alone(brief: LeaseStore) -> None:
    sealed = a_job(max_attempts=4)
    die_under(brief, sealed)
    assert isinstance(die_under(brief, sealed), Requeued), "once may be anything: it ran beside others again"

    assert brief.claim(QueuedJob.of(sealed), "crowded") == Suspect()
    alone = brief.claim(QueuedJob.of(sealed), "empty", is_alone=True)
    assert isinstance(alone, Claimed)
    assert alone.attempt == 3, "being turned away is no attempt"


def test_last_attempt_after_a_death_is_not_spent_beside_others(brief: LeaseStore) -> None:
    sealed = a_job(max_attempts=2)
    die_under(brief, sealed)
    assert brief.claim(QueuedJob.of(sealed), "crowded") == Suspect()
    assert isinstance(die_under(brief, sealed, is_alone=True), TakenOver)


def test_failed_attempts_raise_no_suspicion(store: LeaseStore) -> None:
    sealed = a_job(max_attempts=3)
    for _ in range(2):
        lease = claim(store, sealed)
        assert store.retry(lease, a_failure(lease), 0, None) == "queued"
    assert claim(store, sealed).attempt == 3
