"""What an operator would count after a fault, read from Redis alone."""

import time
from typing import Any, cast

from redis import Redis

from keye.config import keys
from keye.config.codes import JobState
from keye.config.job import Priority
from keye.config.outcome import OUTCOME, JobFailure, JobResult
from keye.config.topology import UNACKED, message_list
from keye.producer import Client, Job
from tests.support.conditions import eventually


def wait_for_all(redis: Redis, jobs: list[Job], within_seconds: float) -> float:
    """Until every job has ended; the seconds that it took."""
    began = time.monotonic()
    waiting = [job.id for job in jobs]

    def have_ended() -> bool:
        states = zip(waiting, _field(redis, waiting, "state"), strict=True)
        waiting[:] = [job_id for job_id, state in states if not JobState(state).is_final]
        return not waiting

    eventually(have_ended, within_seconds)
    return time.monotonic() - began


def count_ended(redis: Redis, jobs: list[Job]) -> int:
    return sum(JobState(state).is_final for state in _field(redis, [job.id for job in jobs], "state"))


def attempts_of(redis: Redis, jobs: list[Job]) -> list[int]:
    return [int(attempts) for attempts in _field(redis, [job.id for job in jobs], "attempts")]


def workers_of(redis: Redis, jobs: list[Job]) -> list[str | None]:
    """Names of those that ran them last; None for a job that waits for its first."""
    return _field(redis, [job.id for job in jobs], "worker")


def outcome_of(redis: Redis, job: Job) -> JobResult | JobFailure:
    return OUTCOME.validate_json(cast(str, redis.hget(keys.record(job.id), "outcome")))


def assert_each_succeeded_once(redis: Redis, jobs: list[Job]) -> None:
    """One outcome and one last event each, and no attempt unaccounted for."""
    for job_id, record in assert_each_ended_once(redis, jobs).items():
        assert record["state"] == JobState.SUCCEEDED, (job_id, record)
        died = sum(field.startswith("attempt:") for field in record)
        assert int(record["attempts"]) == 1 + died, (job_id, record)


def assert_each_ended_once(redis: Redis, jobs: list[Job]) -> dict[str, dict[str, str]]:
    """One outcome and one last event each; their records."""
    ids = [job.id for job in jobs]
    assert len(set(ids)) == len(ids)
    with redis.pipeline(transaction=False) as reading:
        for job_id in ids:
            reading.hgetall(keys.record(job_id))
            reading.xrange(keys.events(job_id))
        answers = reading.execute()
    for job_id, record, events in zip(ids, answers[::2], answers[1::2], strict=True):
        assert record["outcome"], job_id
        assert sum('"ended"' in event["event"] for _, event in events) == 1, (job_id, events)
    return dict(zip(ids, answers[::2], strict=True))


def assert_nothing_is_left(client: Client, redis: Redis, lease_seconds: float) -> None:
    """No lease, no queued job, no message; a dead worker's message may be with it for as long as a lease."""
    names = [keys.LEASES, *(keys.queued(p) for p in Priority), *(message_list(p) for p in Priority), UNACKED]

    def left() -> dict[str, Any]:
        return {name: redis.type(name) for name in names if redis.exists(name)}

    eventually(lambda: not left(), within_seconds=4 * lease_seconds)
    _, irregularities = client.verify()
    assert irregularities == []


def _field(redis: Redis, job_ids: list[str], name: str) -> list[Any]:
    with redis.pipeline(transaction=False) as reading:
        for job_id in job_ids:
            reading.hget(keys.record(job_id), name)
        return reading.execute()
