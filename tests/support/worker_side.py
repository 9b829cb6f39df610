"""What a worker writes of a job, for tests of who waits for it."""

import json
import time
from typing import Any

from redis import Redis

from keye.config import keys
from keye.config.codes import Stage
from keye.config.event import JobEnded, StageStarted
from keye.config.outcome import JobFailure, JobResult, ModelIdentity, StageTimings, TokenUsage, WorkerIdentity
from keye.producer import (
    AnalysisJob,
    ErrorCode,
    Job,
)

JOB = AnalysisJob(prompt="What is it?", metadata={"order": 7})


def asked(job: Job, redis: Redis) -> dict[str, Any]:
    """What the record of the job says, as JSON has it."""
    (sealed,) = redis.hmget(keys.record(job.id), "sealed")
    return json.loads(sealed)["job"]


def start(redis: Redis, job: Job) -> None:
    """What a worker's claim writes."""
    redis.hset(keys.record(job.id), mapping={"state": "RUNNING", "attempts": 1})
    redis.zadd(keys.LEASES, {job.id: time.time() + 30})
    event = StageStarted(stage=Stage.FETCH, attempt=1, at=time.time())
    redis.xadd(keys.events(job.id), {"event": event.model_dump_json()})


def settle(redis: Redis, job: Job, outcome: JobResult | JobFailure) -> None:
    """What a worker's settlement writes, in one move."""
    with redis.pipeline(transaction=True) as move:
        record = {"state": outcome.state.value, "outcome": outcome.model_dump_json()}
        move.hset(keys.record(job.id), mapping=record)
        ended = JobEnded(state=outcome.state, at=time.time())
        move.xadd(keys.events(job.id), {"event": ended.model_dump_json()})
        move.execute()


def answer(job: Job, text: str = "a red square") -> JobResult:
    return result_of(job.id, text)


def result_of(job_id: str, text: str, attempts: int = 1) -> JobResult:
    return JobResult(
        job_id=job_id,
        answer=text,
        reasoning=None,
        raw_text=text,
        finish_reason="stop",
        usage=TokenUsage(prompt_tokens=9, visual_tokens=4, completion_tokens=3),
        timings=StageTimings(),
        media=(),
        model=ModelIdentity(name="keye", model_type="KeyeVL", precision="float32"),
        worker=WorkerIdentity(host="here", pid=1, device="cpu"),
        attempts=attempts,
        metadata={"order": 7},
    )


def failure(job: Job, code: ErrorCode = ErrorCode.MEDIA_NOT_FOUND) -> JobFailure:
    return JobFailure(
        job_id=job.id, code=code, message="No such file.", stage=Stage.FETCH, retryable=False, attempts=1, media_index=0
    )
