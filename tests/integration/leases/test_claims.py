"""Who may run a job, on a real server: one of many, once more after deaths, and alone where it may kill."""

import json
import threading
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from keye.config import keys
from keye.config.codes import JobState, Stage
from keye.config.job import Priority
from keye.config.topology import message_list
from keye.config.wire import SealedJob
from keye.worker.leases.claims import (
    AlreadySettled,
    Claimed,
    HeldElsewhere,
    QueuedJob,
    Requeued,
    Suspect,
    TakenOver,
)
from keye.worker.leases.job_lease import LeaseStore
from keye.worker.results.settlement import Settlement
from tests.support.conditions import eventually
from tests.support.leased_jobs import a_failure, a_job, claim, events, messages, record


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


@pytest.mark.holds("docs/design.md#decisions", "*claims* the job by one atomic script")
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


@pytest.mark.holds("docs/design.md#one-job-walked", "AlreadySettled, HeldElsewhere, Forgotten or Suspect")
def test_redelivery_after_settling_finds_the_outcome(store: LeaseStore, settlement: Settlement) -> None:
    sealed = a_job()
    lease = claim(store, sealed)
    settlement.settle(lease, a_failure(lease))
    assert store.claim(QueuedJob.of(sealed), "worker-2") == AlreadySettled(a_failure(lease))


def die_under(brief: LeaseStore, sealed: SealedJob, is_alone: bool = False) -> Requeued | TakenOver | None:
    assert isinstance(brief.claim(QueuedJob.of(sealed), "dies", is_alone), Claimed)
    eventually(lambda: sealed.job_id in brief.due(keys.LEASES, 10))
    return brief.reap(sealed.job_id, "reaper")


@pytest.mark.holds(
    "docs/design.md#decisions",
    "A job whose worker died twice, or once before its last attempt, runs alone in its process.",
)
def test_job_whose_workers_died_twice_is_claimed_only_by_who_runs_it_alone(brief: LeaseStore) -> None:
    sealed = a_job(max_attempts=4)
    die_under(brief, sealed)
    assert isinstance(die_under(brief, sealed), Requeued), "once may be anything: it ran beside others again"

    assert brief.claim(QueuedJob.of(sealed), "crowded") == Suspect()
    alone = brief.claim(QueuedJob.of(sealed), "empty", is_alone=True)
    assert isinstance(alone, Claimed)
    assert alone.attempt == 3, "being turned away is no attempt"


@pytest.mark.holds(
    "docs/operations.md#a-worker-was-killed-or-its-machine-is-gone-what-must-i-do",
    "or once before its last attempt, runs alone",
    "where jobs set `max_attempts` to 2 one death makes suspects of all that ran",
)
def test_last_attempt_after_a_death_is_not_spent_beside_others(brief: LeaseStore) -> None:
    sealed = a_job(max_attempts=2)
    die_under(brief, sealed)
    assert brief.claim(QueuedJob.of(sealed), "crowded") == Suspect()
    assert isinstance(die_under(brief, sealed, is_alone=True), TakenOver)


def test_job_whose_worker_died_once_waits_for_its_place_from_its_claim_on(brief: LeaseStore, redis: Redis) -> None:
    sealed = a_job()
    first = brief.claim(QueuedJob.of(sealed), "dies", in_company=True)
    assert isinstance(first, Claimed)
    assert not first.waits
    eventually(lambda: brief.reap(sealed.job_id, "reaper"))

    second = brief.claim(QueuedJob.of(sealed), "dies too", in_company=True)
    assert isinstance(second, Claimed)
    assert second.waits
    eventually(lambda: brief.reap(sealed.job_id, "reaper"))
    assert record(redis, sealed.job_id)["deaths"] == "1", "it had not begun"

    third = brief.claim(QueuedJob.of(sealed), "lives", in_company=True)
    assert isinstance(third, Claimed)
    assert (third.waits, third.attempt, third.max_attempts) == (True, 3, 4)


def test_claim_of_one_that_waits_says_so_again_where_its_answer_got_lost(brief: LeaseStore, redis_url: str) -> None:
    sealed = a_job()
    die_under(brief, sealed)
    with LosesItsFirstAnswer.from_url(redis_url, decode_responses=True) as client:
        again = LeaseStore(client, lease_seconds=30).claim(QueuedJob.of(sealed), "lives", in_company=True)
    assert client.has_lost
    assert isinstance(again, Claimed)
    assert (again.waits, again.attempt) == (True, 2)


@pytest.mark.holds(
    "docs/operations.md#a-worker-was-killed-or-its-machine-is-gone-what-must-i-do",
    "After two deaths those are eight, and the next to be taken",
)
def test_those_that_are_to_run_alone_are_the_next_to_be_taken_once(brief: LeaseStore, redis: Redis) -> None:
    jobs = [a_job(max_attempts=5) for _ in range(3)]
    places = []
    for _ in range(3):
        queue = message_list(Priority.NORMAL)
        redis.delete(queue)
        redis.lpush(queue, json.dumps({"headers": {"id": "waits"}}))
        for sealed in jobs:
            claim(brief, sealed, "dies", is_alone=True)
        eventually(lambda: len(brief.due(keys.LEASES, 10)) >= len(jobs))
        for sealed in jobs:
            requeued = brief.reap(sealed.job_id, "reaper")
            assert isinstance(requeued, Requeued)
            brief.publish(requeued)
        places.append(messages(redis).index("waits"))
    assert places == [0, len(jobs), 0], "behind it after one death, before it after two, and behind it from then on"


def test_failed_attempts_raise_no_suspicion(store: LeaseStore) -> None:
    sealed = a_job(max_attempts=3)
    for _ in range(2):
        lease = claim(store, sealed)
        assert store.retry(lease, a_failure(lease), 0, None) == "queued"
    assert claim(store, sealed).attempt == 3


def test_job_under_the_id_of_one_that_is_gone_has_a_stream_of_its_own(store: LeaseStore, redis: Redis) -> None:
    sealed = a_job()
    first = claim(store, sealed)
    redis.expire(keys.events(sealed.job_id), 60)
    redis.delete(keys.record(sealed.job_id))
    again = claim(store, sealed)
    assert again.token != first.token
    assert len(events(redis, sealed.job_id)) == 1
    assert redis.ttl(keys.events(sealed.job_id)) == -1
