"""Jobs that nobody has any more, of dead workers or with lost messages, are found and published once."""

import json
import time
from base64 import b64decode
from typing import Any

import pytest
from redis import Redis

from keye.config import keys
from keye.config.codes import ErrorCode, JobState, QueuedAgain, Stage
from keye.config.connection import connect
from keye.config.contract import Report
from keye.config.event import FramesDecoded, StageStarted, TextGenerated
from keye.config.job import Priority
from keye.config.outcome import FailedAttempt
from keye.config.topology import QUEUE, SHARED_UNACKED, SHARED_UNACKED_INDEX, message, message_list
from keye.worker.leases.claims import Claimed, QueuedJob, Requeued, TakenOver
from keye.worker.leases.job_lease import LeaseStore
from keye.worker.results.event_writer import AttemptEvents, EventWriter
from keye.worker.results.settlement import Settlement
from tests.support.conditions import eventually
from tests.support.leased_jobs import (
    BRIEF_LEASE_SECONDS,
    a_failure,
    a_job,
    a_reaper,
    claim,
    events,
    messages,
    publish,
    record,
)
from tests.support.redis_login import log_in


def test_reaper_leaves_a_lease_that_was_renewed_after_it_looked(brief: LeaseStore, redis: Redis) -> None:
    lease = claim(brief, a_job())
    eventually(lambda: brief.due(keys.LEASES, 10))
    assert brief.renew([lease]) == ["renewed"]
    assert brief.reap(lease.job_id, "reaper") is None
    assert record(redis, lease.job_id)["state"] == JobState.RUNNING


@pytest.mark.holds("docs/design.md#decisions", "A reaper in every worker puts jobs with expired leases back.")
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
    assert redis.zcard(keys.LEASES) == 0
    moves = [(event.stage, event.reason) for event in events(redis, sealed.job_id)]
    assert moves == [(Stage.OPEN, None), (Stage.QUEUED, QueuedAgain.LOST)]


def test_requeued_job_whose_message_was_not_published_is_reaped_again(brief: LeaseStore) -> None:
    sealed = a_job()
    claim(brief, sealed, "dead")
    eventually(lambda: brief.due(keys.LEASES, 10))
    assert isinstance(brief.reap(sealed.job_id, "this reaper dies before it publishes"), Requeued)

    eventually(lambda: brief.due(keys.LEASES, 10))
    requeued = brief.reap(sealed.job_id, "the next reaper")
    assert isinstance(requeued, Requeued)
    brief.publish(requeued)
    assert brief.redis.zcard(keys.LEASES) == 0
    assert claim(brief, sealed).attempt == 2, "being queued twice is no attempt"


def test_publishing_too_late_does_not_end_the_next_lease(brief: LeaseStore, redis: Redis) -> None:
    sealed = a_job()
    claim(brief, sealed, "dead")
    eventually(lambda: brief.due(keys.LEASES, 10))
    requeued = brief.reap(sealed.job_id, "reaper")
    assert isinstance(requeued, Requeued)
    claim(brief, sealed, "faster than the message")
    brief.publish(requeued)
    assert messages(redis) == []
    eventually(lambda: brief.due(keys.LEASES, 10) == [sealed.job_id])


def test_job_whose_attempts_are_used_up_is_taken_over_and_settled_once(
    brief: LeaseStore, settlement: Settlement, redis: Redis
) -> None:
    sealed = a_job(max_attempts=1)
    dead = claim(brief, sealed, "dead")
    eventually(lambda: brief.due(keys.LEASES, 10))
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
    eventually(lambda: brief.due(keys.LEASES, 10))
    assert isinstance(brief.reap(sealed.job_id, "dies too"), TakenOver)
    assert brief.reap(sealed.job_id, "too early") is None
    eventually(lambda: brief.due(keys.LEASES, 10))
    assert isinstance(brief.reap(sealed.job_id, "lives"), TakenOver)


def test_cancelled_job_of_a_dead_worker_does_not_run_again(brief: LeaseStore, redis: Redis) -> None:
    sealed = a_job(max_attempts=3)
    claim(brief, sealed, "dead")
    redis.hset(keys.record(sealed.job_id), "cancel_requested", "1")
    eventually(lambda: brief.due(keys.LEASES, 10))
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
    eventually(lambda: brief.redis.zcard(keys.LEASES) == 0)
    for reaper in reapers:
        reaper.stop()
    assert sorted(messages(redis)) == sorted(sealed.job_id for sealed in jobs)


def test_jobs_that_cannot_be_looked_after_hold_up_nobody(
    brief: LeaseStore, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    redis.set(keys.record("no-hash"), "of another kind")
    redis.hset(keys.record("odd"), mapping={"state": "QUEUED", "priority": "whenever"})
    overdue = time.time() - 100
    redis.zadd(keys.LEASES, {"no-hash": overdue, "odd": overdue})
    redis.zadd(keys.DEADLINES, {"no-hash": overdue, "late": overdue})
    lost = a_job()
    claim(brief, lost)
    eventually(lambda: lost.job_id in brief.due(keys.LEASES, 10))
    expired: list[str] = []
    reaper = a_reaper(brief, expire=lambda late: expired.append(late.job_id))
    for _ in range(2):
        reaper.look_around()

    assert messages(redis) == [lost.job_id]
    assert "late" in expired
    told = [line for line in caplog.messages if "cannot be looked after" in line]
    assert len(told) == 3, "once a lease, not at every look"
    eventually(lambda: {"no-hash", "odd"} <= set(brief.due(keys.LEASES, 10)))


@pytest.mark.parametrize(
    ("kind", "facts", "stage"),
    [
        (StageStarted, {"stage": Stage.PREPARE}, Stage.PREPARE),
        (FramesDecoded, {"media_index": 0, "done": 1, "total": 9}, Stage.DECODE),
        (TextGenerated, {"channel": "answer", "text": "a", "offset": 0, "num_tokens": 1}, Stage.GENERATE),
    ],
)
def test_the_stage_a_worker_died_in_is_known_from_its_last_words(
    brief: LeaseStore, client: Redis, kind: type[Report], facts: dict[str, Any], stage: Stage
) -> None:
    lease = claim(brief, a_job(max_attempts=1))
    assert AttemptEvents(EventWriter(client), lease).tell(kind, **facts)
    eventually(lambda: brief.due(keys.LEASES, 10))
    taken = brief.reap(lease.job_id, "reaper")
    assert isinstance(taken, TakenOver)
    assert taken.stage is stage


def die(brief: LeaseStore, lease: Claimed, waits: bool, *told: tuple[type[Report], dict[str, Any]]) -> None:
    """Its worker says so much, and then nothing any more."""
    writer = EventWriter(brief.redis)
    for kind, facts in told:
        assert AttemptEvents(writer, lease).tell(kind, **facts)
    if waits:
        writer.write_waits(lease, True)
    eventually(lambda: lease.job_id in brief.due(keys.LEASES, 10))


FETCH = (StageStarted, {"stage": Stage.FETCH})
DECODE = (StageStarted, {"stage": Stage.DECODE})
FRAMES = (FramesDecoded, {"media_index": 0, "done": 1, "total": 9})
PREPARE = (StageStarted, {"stage": Stage.PREPARE})
GENERATE = (StageStarted, {"stage": Stage.GENERATE})
TEXT = (TextGenerated, {"channel": "answer", "text": "a", "offset": 0, "num_tokens": 1})


@pytest.mark.holds("docs/reliability.md#promises", "A death counts for jobs that")
@pytest.mark.holds(
    "docs/operations.md#a-worker-was-killed-or-its-machine-is-gone-what-must-i-do",
    "It does not count for a job that was",
)
@pytest.mark.parametrize(
    ("told", "waits", "counts"),
    [
        ([], False, True),
        # Of who asks for fewer attempts than usual.
        ([FETCH], False, True),
        ([FETCH, DECODE], False, True),
        ([FETCH, DECODE], True, False),
        ([FETCH, DECODE, FRAMES], False, True),
        ([FETCH, DECODE, FRAMES], True, False),
        ([FETCH, DECODE, PREPARE], False, True),
        ([GENERATE], False, True),
        ([GENERATE], True, False),
        # It could not be noted that it waits no longer.
        ([GENERATE, TEXT], True, True),
    ],
)
def test_a_death_counts_for_what_was_in_a_decoder_or_in_the_engine(
    brief: LeaseStore, redis: Redis, told: list[tuple[type[Report], dict[str, Any]]], waits: bool, counts: bool
) -> None:
    lease = claim(brief, a_job(max_attempts=1), "dead")
    die(brief, lease, waits, *told)
    reaped = brief.reap(lease.job_id, "reaper")
    assert isinstance(reaped, TakenOver if counts else Requeued)
    found = record(redis, lease.job_id)
    assert (found.get("deaths"), found.get("spared")) == (("1", None) if counts else (None, "1"))
    # Either way it is told.
    assert FailedAttempt.model_validate_json(found["attempt:1"]).code is ErrorCode.WORKER_LOST
    if not counts:
        again = brief.claim(QueuedJob(lease.job_id, {}), "next")
        assert isinstance(again, Claimed), "it need not run alone"
        assert (again.attempt, again.max_attempts) == (2, 2)


@pytest.mark.holds("docs/reliability.md#promises", "where its `max_attempts` is 1 or 2, a fetch counts")
@pytest.mark.parametrize(("max_attempts", "counts"), [(1, True), (2, True), (3, False), (None, False)])
def test_a_death_while_media_are_fetched_counts_for_who_asked_for_fewer_attempts_than_usual(
    brief: LeaseStore, redis: Redis, max_attempts: int | None, counts: bool
) -> None:
    lease = claim(brief, a_job(max_attempts=max_attempts), "dead")
    die(brief, lease, False, FETCH)
    brief.reap(lease.job_id, "reaper")
    found = record(redis, lease.job_id)
    assert (found.get("deaths"), found.get("spared")) == (("1", None) if counts else (None, "1"))


def test_a_wait_that_is_over_or_of_another_attempt_spares_nothing(brief: LeaseStore, redis: Redis) -> None:
    writer, first = EventWriter(brief.redis), claim(brief, a_job(max_attempts=3))
    writer.write_waits(first, True)
    writer.write_waits(first, False)
    die(brief, first, False, GENERATE)
    assert isinstance(brief.reap(first.job_id, "reaper"), Requeued)
    assert record(redis, first.job_id)["deaths"] == "1"
    second = claim(brief, a_job(max_attempts=3))
    die(brief, second, True, GENERATE)
    brief.reap(second.job_id, "reaper")
    again = brief.claim(QueuedJob(second.job_id, {}), "next")
    assert isinstance(again, Claimed)
    # It wakes up, and is not asked any more.
    writer.write_waits(second, True)
    die(brief, again, False, GENERATE)
    brief.reap(second.job_id, "reaper")
    assert record(redis, second.job_id)["deaths"] == "1"


@pytest.mark.holds("docs/reliability.md#promises", "up to ten times")
def test_a_job_whose_workers_die_while_it_waits_comes_to_an_end(brief: LeaseStore, redis: Redis) -> None:
    sealed = a_job(max_attempts=1)
    for _ in range(10):
        die(brief, claim(brief, sealed), True, GENERATE)
        assert isinstance(brief.reap(sealed.job_id, "reaper"), Requeued)
    die(brief, claim(brief, sealed), True, GENERATE)
    taken = brief.reap(sealed.job_id, "reaper")
    assert isinstance(taken, TakenOver)
    assert (taken.lease.attempt, taken.lease.max_attempts) == (11, 11)


def test_a_cancelled_job_that_waited_when_its_worker_died_is_ended(brief: LeaseStore, redis: Redis) -> None:
    lease = claim(brief, a_job(max_attempts=3))
    redis.hset(keys.record(lease.job_id), "cancel_requested", "1")
    die(brief, lease, True, GENERATE)
    taken = brief.reap(lease.job_id, "reaper")
    assert isinstance(taken, TakenOver)
    assert taken.cancel_requested


@pytest.mark.holds("docs/design.md#decisions", "is noticed because jobs published after it were taken")
@pytest.mark.holds(
    "docs/operations.md#a-job-waits-and-waits-is-its-message-lost",
    "when jobs published after it were taken from its queue",
)
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


@pytest.mark.holds("docs/operations.md#a-job-waits-and-waits-is-its-message-lost", "taken from its queue")
def test_queues_of_other_priorities_say_nothing_about_a_message(store: LeaseStore, redis: Redis) -> None:
    patient, urgent = a_job(priority="low"), a_job(priority="high")
    publish(redis, patient, time.time() - 200)
    publish(redis, urgent, time.time() - 100)
    claim(store, urgent)
    assert store.sweep(10) == ([], [])


@pytest.mark.holds("docs/design.md#decisions", "or its queue is empty, and put there too")
@pytest.mark.holds(
    "docs/operations.md#a-job-waits-and-waits-is-its-message-lost",
    "when that queue is empty, and two leases have passed",
)
def test_last_message_is_missed_when_there_are_none_left(store: LeaseStore, redis: Redis) -> None:
    sealed, fresh = a_job(), a_job()
    publish(redis, sealed, time.time() - 200)
    publish(redis, fresh)
    assert store.sweep(10) == ([], []), "nothing was taken yet"
    redis.delete(message_list(Priority.NORMAL))
    assert store.sweep(10) == ([], [sealed.job_id]), "the fresh one's may be on its way"
    assert store.sweep(10, [sealed.job_id]) == ([sealed.job_id], [])


def test_a_message_between_its_list_and_its_claim_is_not_missed_twice(store: LeaseStore, redis: Redis) -> None:
    lost, on_its_way = a_job(), a_job()
    publish(redis, lost, time.time() - 200)
    publish(redis, on_its_way, time.time() - 100)
    redis.delete(message_list(Priority.NORMAL))
    reaper = a_reaper(store)
    reaper.look_around()
    claim(store, on_its_way)
    reaper.look_around()
    assert messages(redis) == [lost.job_id]


def test_a_job_with_two_messages_makes_no_other_seem_lost(brief: LeaseStore, redis: Redis) -> None:
    twice, patient = a_job(), a_job()
    publish(redis, twice, time.time() - 200)
    publish(redis, patient, time.time() - 100)
    redis.zadd(keys.LEASES, {twice.job_id: time.time() - 1})
    a_reaper(brief).reap_overdue()
    claim(brief, twice)
    assert brief.sweep(10) == ([], [])


@pytest.mark.parametrize("priority", Priority)
def test_messages_that_workers_of_the_release_before_left_go_to_the_head_of_their_queue(
    brief: LeaseStore, redis: Redis, priority: Priority
) -> None:
    """Ours only, and only those that its workers would have handed out themselves were there any."""

    def hold(name: str, queue: str, taken_at: float) -> None:
        entry = [json.loads(message(name, json.dumps({"of": name}), priority)), "", queue]
        redis.hset(SHARED_UNACKED, name, json.dumps(entry))
        redis.zadd(SHARED_UNACKED_INDEX, {name: taken_at})

    for number in range(50):
        hold(f"mail-{number}", "mails", number)
    hold("old", QUEUE, 100)
    hold("taken just now", QUEUE, time.time() + 60)
    redis.lpush(message_list(priority), message("waits", None, priority))
    reaper = a_reaper(brief)
    for _ in range(3):
        assert messages(redis, priority) == ["waits"]
        reaper.look_around()
    assert messages(redis, priority) == ["old", "waits"]
    sealed = json.loads(b64decode(json.loads(redis.lrange(message_list(priority), -1, -1)[0])["body"]))[1]
    assert sealed == {"sealed": {"of": "old"}}
    for _ in range(4):
        reaper.look_around()
    assert messages(redis, priority) == ["old", "waits"]
    assert redis.hlen(SHARED_UNACKED) == redis.zcard(SHARED_UNACKED_INDEX) == 51


def test_a_reaper_that_may_not_see_what_all_celery_apps_share_does_the_rest(redis: Redis, redis_url: str) -> None:
    ours = ("~keye:*", "~keye.jobs*", "~_kombu.binding.*")
    redis.execute_command("ACL", "SETUSER", "worker", "reset", "on", ">secret", *ours, "+@all")
    try:
        with connect(log_in(redis_url, "worker:secret")) as allowed:
            store = LeaseStore(allowed, BRIEF_LEASE_SECONDS)
            sealed = a_job()
            claim(store, sealed, "dead")
            eventually(lambda: store.due(keys.LEASES, 10))
            a_reaper(store).look_around()
        assert messages(redis) == [sealed.job_id]
    finally:
        redis.execute_command("ACL", "DELUSER", "worker")
