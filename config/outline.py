"""What can be told of any job: enough to find, cancel or end one that this release cannot read."""

from typing import Annotated, Any, Self

from pydantic import (
    Field,
    JsonValue,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
)

from keye.config.contract import Report
from keye.config.job import AnalysisJob, Priority
from keye.config.job_id import JobId
from keye.config.state import JobState

Name = Annotated[str, StringConstraints(min_length=1)]


class _Lenient(Report):
    @field_validator("*", mode="wrap")
    @classmethod
    def _readable_or_default(cls, value: Any, read: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        try:
            return read(value)
        except ValidationError:
            return cls.model_fields[info.field_name or ""].get_default(call_default_factory=True)


class JobOutline(_Lenient):
    """Of `AnalysisJob`, what does not depend on what it asks for."""

    priority: Priority = Priority.NORMAL
    deadline_seconds: Annotated[float, Field(gt=0)] | None = None
    max_attempts: Annotated[int, Field(ge=1)] = 3
    idempotency_key: Name | None = None
    metadata: dict[str, JsonValue] = Field(default_factory=dict)


class Outline(_Lenient):
    """Of `SealedJob`, whatever release sealed it and however broken it is: what cannot be read is as if left out."""

    job_id: JobId | None = None
    submitted_at: float | None = None
    job: JobOutline = JobOutline()

    @classmethod
    def of(cls, payload: Any) -> Self:
        """Never raises, whatever decoded JSON it is given."""
        return cls.model_validate(payload) if isinstance(payload, dict) else cls()

    def record(self, sealed_json: str) -> dict[str, str]:
        """As `SealedJob.record`; `sealed_json` is the job as it was sealed."""
        return record_of(self.job, self.submitted_at, sealed_json)


def record_of(job: AnalysisJob | JobOutline, submitted_at: float | None, sealed_json: str) -> dict[str, str]:
    """The fields of a job's record (see `keye.config.keys.record`) at the moment of submission."""
    deadline = job.deadline_seconds
    return {
        "state": JobState.QUEUED.value,
        "sealed": sealed_json,
        "priority": job.priority.value,
        "submitted_at": "" if submitted_at is None else repr(submitted_at),
        "deadline_at": "" if deadline is None or submitted_at is None else repr(submitted_at + deadline),
        "attempts": "0",
        "max_attempts": str(job.max_attempts),
    }
