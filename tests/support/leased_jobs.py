"""Jobs as tests of leases need them, and what lies in Redis about them."""

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from redis import Redis

from keye.config import keys
from keye.config.codes import ErrorCode, JobState, Stage
from keye.config.event import EVENT
from keye.config.job import AnalysisJob, Priority
from keye.config.outcome import JobFailure, JobResult
from keye.config.topology import message_list
from keye.config.wire import SealedJob, seal
from keye.worker.leases.claims import Claimed, LateJob, QueuedJob
from keye.worker.leases.job_lease import LeaseStore
from keye.worker.leases.reaper import Reaper
from keye.worker.telemetry import metrics
from tests.support.worker_side import result_of

TTL = 3600
DEAD_LETTER_TTL = 9000
BRIEF_LEASE_SECONDS = 0.3
FINAL = set(JobState) - {JobState.QUEUED, JobState.RUNNING}


def a_job(**options: object) -> SealedJob:
    return seal(AnalysisJob.model_validate({"prompt": "what is it?", **options}))


def claim(store: LeaseStore, sealed: SealedJob, worker: str = "worker-1", is_alone: bool = False) -> Claimed:
    claimed = store.claim(QueuedJob.of(sealed), worker, is_alone)
    assert isinstance(claimed, Claimed)
    return claimed


def an_answer(lease: Claimed) -> JobResult:
    return result_of(lease.job_id, "yes", lease.attempt)


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
    return Reaper(store, "reaper", deliver=(), dead_letter=lambda taken: None, expire=expire)


def publish(redis: Redis, sealed: SealedJob, at: float | None = None) -> None:
    """What the producer leaves behind once its message is out."""
    redis.hset(keys.record(sealed.job_id), mapping=sealed.record)
    redis.zadd(keys.queued(sealed.job.priority), {sealed.job_id: time.time() if at is None else at})
    redis.lpush(message_list(sealed.job.priority), sealed.job_id)


def time_passes(redis: Redis) -> None:
    """So much that all that ever expires is gone."""
    for name in redis.scan_iter(count=1000):
        if redis.ttl(name) > 0:
            redis.delete(name)


def ends(records: Sequence[logging.LogRecord], job_id: str) -> list[str]:
    """The states that the log says the job ended in."""
    told = [vars(record) for record in records]
    return [each["state"] for each in told if each.get("job_id") == job_id and each.get("state") in FINAL]


@contextmanager
def counting(**ended: int) -> Iterator[None]:
    """That as many jobs are counted meanwhile, by outcome."""

    def counted(outcome: str) -> float:
        samples = [sample for family in metrics.JOBS.collect() for sample in family.samples]
        return sum(s.value for s in samples if s.name == "keye_jobs_total" and s.labels["outcome"] == outcome)

    before = {outcome: counted(outcome) for outcome in ended}
    yield
    assert {outcome: counted(outcome) - before[outcome] for outcome in ended} == ended
