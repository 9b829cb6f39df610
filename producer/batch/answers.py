"""What is written of how a line ended: in our own form, or in OpenAI's."""

import json
from typing import Any, NamedTuple

from keye.config.codes import ErrorCode
from keye.config.faults import IdempotencyConflict, InvalidJob, JobUnreadable, UploadFailed
from keye.config.outcome import JobFailure, JobResult
from keye.producer.batch import openai
from keye.producer.batch.lines import Row
from keye.producer.following import End


class Missing(NamedTuple):
    """Nothing is kept of a job that was sent so many `seconds` ago; how it ends is kept for `kept_seconds`."""

    seconds: float
    kept_seconds: float

    @property
    def is_lost(self) -> bool:
        """It cannot have expired, however soon it ended."""
        return self.seconds < self.kept_seconds


_CODES = {
    InvalidJob: ErrorCode.INVALID_JOB.value,
    UploadFailed: "UPLOAD_FAILED",
    IdempotencyConflict: "IDEMPOTENCY_CONFLICT",
    JobUnreadable: "OUTCOME_UNREADABLE",
}


def answer_line(row: Row, result: JobResult, now: float) -> str:
    """Our own is the result itself, called by its custom_id."""
    if row.is_openai:
        return json.dumps(openai.answered(row.custom_id or "", result, now))
    return f'{{"custom_id":{json.dumps(row.custom_id)},"line":{row.number},{result.model_dump_json()[1:]}'


def error_line(row: Row, job_id: str, end: End | Missing) -> str:
    """Our own has what a `JobFailure` has."""
    code, message = code_of(end), message_of(row, end)
    if row.is_openai:
        is_callers = isinstance(end, InvalidJob | IdempotencyConflict) or (
            isinstance(end, JobFailure) and end.code.facts.blame != "service"
        )
        return json.dumps(openai.unanswered(row.custom_id, job_id, code, message, is_callers))
    facts: dict[str, Any] = {"custom_id": row.custom_id, "line": row.number}
    if isinstance(end, JobFailure):
        facts |= end.model_dump(mode="json")
    else:
        facts |= {"kind": "failure", "job_id": job_id, "code": code}
    return json.dumps({**facts, "message": message})


def code_of(end: End | Missing) -> str:
    """Of a line that has no answer: its job's, or what stands in place of an outcome."""
    if isinstance(end, JobFailure):
        return end.code.value
    if isinstance(end, Missing):
        return "JOB_LOST" if end.is_lost else "OUTCOME_EXPIRED"
    return next((code for kind, code in _CODES.items() if isinstance(end, kind)), ErrorCode.INTERNAL.value)


def message_of(row: Row, end: End | Missing) -> str:
    if isinstance(end, JobFailure):
        return end.message
    if not isinstance(end, Missing):
        return f"line {row.number}: {end}"
    why = f"how a job ended is kept for {end.kept_seconds:.0f} s (KEYE_RESULT_TTL_SECONDS)"
    if end.is_lost:
        why = "Redis has lost it (it restarted without its data, or evicts), or somebody has purged it"
    return (
        f"line {row.number}: its job was sent {end.seconds:.0f} s ago, and nothing is there of it any more: {why}. It "
        "may have been answered: --retry-failed runs it again."
    )
