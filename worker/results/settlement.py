"""Writes how a job ended: outcome, last event, state, expiry, Celery's result and its message's acknowledgement in one
move of the lease holder.

The result for plain Celery readers (`AsyncResult.get`) is in Celery's own format. Celery would read before it writes,
and write after the job has ended; settled with the outcome it costs no round trip.

Whoever settles, the end is counted and told in the log here, once.
"""

import json
import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Self

from redis import Redis

from keye.config import keys
from keye.config.codes import ErrorCode, JobState, Stage
from keye.config.connection import ArgumentTooLarge, check_arguments
from keye.config.faults import Fault, JobFailed
from keye.config.job import MAX_METADATA_BYTES
from keye.config.outcome import JobFailure, JobResult, Outcome, log_end
from keye.config.scripts import load_script
from keye.config.topology import UNACKED, UNACKED_INDEX, result_key
from keye.config.wire import JobOutline
from keye.worker.leases.claims import Claimed
from keye.worker.leases.job_lease import new_token
from keye.worker.results.event_writer import MAX_EVENTS, without_oversized
from keye.worker.telemetry import metrics

log = logging.getLogger(__name__)

# A job that runs past its deadline is about to be ended; should its worker die first, the next look does it.
LOOK_AGAIN_SECONDS = 10.0
# Of a failure that is written in brief, and of each in a job's history.
MAX_MESSAGE_CHARS = 4096


class OutcomeTooLarge(Fault):
    """The job was answered, and its answer cannot be stored. `failure` is how it ends instead."""

    failure: JobFailure

    @classmethod
    def of(cls, result: JobResult, cause: ArgumentTooLarge) -> Self:
        fault = cls(
            ErrorCode.INVALID_JOB,
            f"The answer of {result.usage.completion_tokens} tokens cannot be stored: {cause}. Have that setting "
            "raised and send the job again, or ask for fewer new tokens (generation.max_new_tokens).",
        )
        fault.failure = JobFailure(
            job_id=result.job_id,
            code=fault.code,
            message=fault.message,
            stage=Stage.GENERATE,
            retryable=fault.code.facts.retryable,
            attempts=result.attempts,
            metadata=result.metadata,
        )
        return fault


class Settlement:
    """Settles jobs; an ended one can be read for `result_ttl_seconds`, and while it is a dead letter, or as it says."""

    def __init__(self, redis: Redis, result_ttl_seconds: int, dead_letter_ttl_seconds: int) -> None:
        self._redis = redis
        self._settle = load_script(redis, "settle")
        self._end_queued = load_script(redis, "end_queued")
        self._result_ttl_seconds = result_ttl_seconds
        self._dead_letter_ttl_seconds = dead_letter_ttl_seconds

    def settle(
        self, lease: Claimed, outcome: Outcome, last_events: Sequence[str] = (), mark: str | None = None
    ) -> bool:
        """Write the outcome, or return False where the lease was lost and another attempt will write its own.

        `last_events` (JSON) are what the attempt said and has not written yet. Raises `OutcomeTooLarge` for a result
        that Redis does not take for its size (a failure is written in brief), and Redis' fault where it is away;
        waiting for it is `outbox`'s. Who asks again after that gives the same `mark`: an answer may have got lost.
        """
        names = [keys.record(lease.job_id), keys.events(lease.job_id), keys.LEASES]
        names += [keys.DEAD_LETTERS, keys.DEADLINES, result_key(lease.job_id), UNACKED, UNACKED_INDEX, keys.ENDED]
        names += keys.idempotency_of(lease.idempotency_key)
        outcome_json, celery_json = self._encode(lease.job_id, outcome)
        # Who wants a job forgotten soon does so whatever becomes of it.
        own = lease.result_ttl_seconds
        ttls = (own, own) if own else (self._result_ttl_seconds, self._dead_letter_ttl_seconds)
        why = ("", "", "")
        if isinstance(outcome, JobFailure):
            why = (outcome.stage, outcome.code, outcome.message[:MAX_MESSAGE_CHARS])
        events = without_oversized(self._redis, lease, last_events)
        args = (lease.job_id, lease.token, outcome.state.value, outcome_json, *ttls, celery_json, MAX_EVENTS)
        answer = self._settle(names, (*args, lease.delivery_tag, mark or new_token(), *why, *events))
        if answer == 1:
            _tell(outcome)
        return bool(answer)

    def tell_celery(self, task_id: str, outcome: Outcome, own_ttl_seconds: int | None = None) -> None:
        """Write an outcome that was settled elsewhere for who waits for this Celery task, unless it has one."""
        key, ttl_seconds = result_key(task_id), own_ttl_seconds or self._result_ttl_seconds
        try:
            _, celery_json = self._encode(task_id, outcome)
        except OutcomeTooLarge as fault:
            _, celery_json = self._encode(task_id, fault.failure)
        if not self._redis.set(key, celery_json, ex=ttl_seconds, nx=True):
            return
        self._redis.publish(key, celery_json)
        if outcome.state is JobState.CANCELLED and outcome.job_id == task_id:
            # In the queue, maybe by a producer of 0.2, which has it expire as its own settings say.
            for ours in (keys.record(task_id), keys.events(task_id)):
                self._redis.expire(ours, ttl_seconds)

    def expire(self, failure: JobFailure, job: JobOutline) -> bool:
        """End a job whose deadline has passed while it waited; False where it has ended, or runs: its worker will."""
        job_id = failure.job_id
        names = [keys.record(job_id), keys.events(job_id), keys.LEASES, keys.queued(job.priority), keys.DEADLINES]
        names += [keys.ENDED, keys.KEPT, keys.unheard(job.priority), keys.CANCELLATIONS]
        names += keys.idempotency_of(job.idempotency_key)
        outcome_json, _ = self._encode(job_id, failure)
        seconds = self._result_ttl_seconds, job.result_ttl_seconds or "", LOOK_AGAIN_SECONDS
        args = (job_id, failure.state.value, outcome_json, *seconds)
        is_ended: bool = self._end_queued(names, args) == JobState.QUEUED
        if is_ended:
            _tell(failure)
        return is_ended

    def _encode(self, task_id: str, outcome: Outcome) -> tuple[str, str]:
        """As JSON and as Celery's result, both of a size that Redis takes; raises `OutcomeTooLarge` for a result."""
        outcome_json = outcome.model_dump_json()
        celery_json = result_message(task_id, outcome, outcome_json)
        try:
            check_arguments(self._redis, (outcome_json, celery_json))
        except ArgumentTooLarge as fault:
            if isinstance(outcome, JobResult):
                raise OutcomeTooLarge.of(outcome, fault) from None
            return self._encode(task_id, _in_brief(outcome, fault))
        return outcome_json, celery_json


def _tell(outcome: Outcome) -> None:
    metrics.count_outcome(outcome)
    log_end(log, outcome)


def result_message(task_id: str, outcome: Outcome, outcome_json: str) -> str:
    """What stands under that key; the result of a job that failed is the exception `JobFailed`."""
    if isinstance(outcome, JobResult):
        status, result = "SUCCESS", outcome_json
    else:
        failed = JobFailed.of(outcome)
        exception = {"exc_type": "JobFailed", "exc_message": failed.args, "exc_module": JobFailed.__module__}
        status, result = "FAILURE", json.dumps(exception)
    done_at = datetime.now(UTC).isoformat()
    meta = json.dumps({"status": status, "traceback": None, "children": [], "date_done": done_at, "task_id": task_id})
    # The outcome is JSON already.
    return f'{meta[:-1]}, "result": {result}}}'


def _in_brief(failure: JobFailure, cause: ArgumentTooLarge) -> JobFailure:
    """The failure without what may be large in it; its code stays, for that is why the job ended."""
    is_small = len(json.dumps(failure.metadata)) <= MAX_METADATA_BYTES
    left_out = f"(Left out: what was written, and metadata beyond {MAX_METADATA_BYTES} bytes. It has {cause}.)"
    return failure.model_copy(
        update={
            "message": f"{failure.message[:MAX_MESSAGE_CHARS]} {left_out}",
            "partial": None,
            "metadata": failure.metadata if is_small else {},
        }
    )
