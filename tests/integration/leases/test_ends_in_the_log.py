"""Each job that ended has its line in the log of who ended it, once, with its reason."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from redis import Redis

from keye.config import keys
from keye.config.codes import ErrorCode, JobState, Stage
from keye.config.connection import Patience
from keye.config.outcome import OUTCOME
from keye.config.wire import SealedJob
from keye.producer import Client
from keye.worker.leases.job_lease import LeaseStore
from keye.worker.leases.reaper import Reaper
from keye.worker.results.outbox import Outbox, Spool, Verdict
from keye.worker.results.settlement import Settlement
from keye.worker.tasks.stragglers import dead_letter, expire
from tests.support.leased_jobs import a_failure, a_job, claim, ends, publish, record


@pytest.fixture
def reaper(store: LeaseStore, settlement: Settlement) -> Reaper:
    return Reaper(store, "reaper", (), partial(dead_letter, settlement), partial(expire, settlement))


@pytest.fixture
def end(
    store: LeaseStore, settlement: Settlement, reaper: Reaper, redis: Redis, redis_url: str, tmp_path: Path
) -> dict[str, Callable[[SealedJob], object]]:
    """The ways for a job that is published to end, by who ends it."""

    def worker(job: SealedJob) -> None:
        lease = claim(store, job)
        settlement.settle(lease, a_failure(lease))

    def next_worker(job: SealedJob) -> None:
        lease, spool = claim(store, job), Spool(tmp_path)
        spool.keep(Verdict(lease=lease, outcome=a_failure(lease)))
        Outbox(settlement, spool, Patience()).deliver()

    def reaper_of_the_dead(job: SealedJob) -> None:
        claim(store, job)
        redis.zadd(keys.LEASES, {job.job_id: 0})
        reaper.look_around()

    def reaper_of_the_late(job: SealedJob) -> None:
        redis.hset(keys.record(job.job_id), "deadline_at", time.time() - 1)
        redis.zadd(keys.DEADLINES, {job.job_id: time.time() - 1})
        reaper.look_around()

    def caller(job: SealedJob) -> None:
        with Client(redis_url) as client:
            client.find(job.job_id).cancel()
            client.find(job.job_id).cancel()

    ways = (worker, next_worker, reaper_of_the_dead, reaper_of_the_late, caller)
    return {way.__name__: way for way in ways}


@pytest.mark.parametrize(
    ("by", "state", "code", "logger"),
    [
        ("worker", JobState.FAILED, ErrorCode.INTERNAL, "keye.worker.results.settlement"),
        ("next_worker", JobState.FAILED, ErrorCode.INTERNAL, "keye.worker.results.settlement"),
        ("reaper_of_the_dead", JobState.FAILED, ErrorCode.WORKER_LOST, "keye.worker.results.settlement"),
        ("reaper_of_the_late", JobState.EXPIRED, ErrorCode.DEADLINE_EXCEEDED, "keye.worker.results.settlement"),
        ("caller", JobState.CANCELLED, ErrorCode.CANCELLED, "keye.producer.job"),
    ],
)
@pytest.mark.holds(
    "docs/operations.md#what-became-of-one-job",
    "and for each job that ended; for a failed one the stage, the code and the sentence",
    "The process that cancels a job in the queue logs that itself",
)
def test_each_end_is_told_once_with_its_reason(
    end: dict[str, Callable[[SealedJob], object]],
    redis: Redis,
    caplog: pytest.LogCaptureFixture,
    by: str,
    state: JobState,
    code: ErrorCode,
    logger: str,
) -> None:
    caplog.set_level("INFO", logger="keye")
    job = a_job(max_attempts=1)
    publish(redis, job)
    end[by](job)

    assert record(redis, job.job_id)["state"] == state
    assert ends(caplog.records, job.job_id) == [state]
    (told,) = (each for each in caplog.records if getattr(each, "state", None) == state)
    assert (told.name, vars(told)["code"]) == (logger, code)
    assert {"attempt", "stage"} <= vars(told).keys()
    assert told.getMessage().startswith(f"job {job.job_id}: {state}, attempt ")
    assert f": {code}: {OUTCOME.validate_json(record(redis, job.job_id)['outcome']).message!r}" in told.getMessage()


def test_a_job_that_lost_its_worker_is_told_of_with_attempt_stage_and_code(
    store: LeaseStore, reaper: Reaper, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="keye")
    job = a_job()
    publish(redis, job)
    claim(store, job, "box:7")
    redis.zadd(keys.LEASES, {job.job_id: 0})
    reaper.look_around()
    (told,) = (vars(each) for each in caplog.records if getattr(each, "state", None) == JobState.QUEUED)
    assert (told["stage"], told["code"]) == (Stage.OPEN, ErrorCode.WORKER_LOST)
    assert told["message"] == f"job {job.job_id}: its worker box:7 died in open, attempt 1, queued again: WORKER_LOST"
