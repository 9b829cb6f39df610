"""What is told in place of an outcome that is larger than what Redis takes."""

import json
from typing import Self

from keye.config.connection import ArgumentTooLarge
from keye.config.faults import Fault
from keye.config.job import MAX_METADATA_BYTES
from keye.config.outcome import ErrorCode, JobFailure, JobResult, Stage

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


def in_brief(failure: JobFailure, cause: ArgumentTooLarge) -> JobFailure:
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
