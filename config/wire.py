"""The sealed job: what is stored in the record and published to the queue, as versioned JSON.

What can be told of any job: enough to find, cancel or end one that this release cannot read.
"""

import hashlib
import json
import time
import uuid
from math import ceil
from typing import Annotated, Any, Self

from pydantic import Field, JsonValue, ValidationError, ValidationInfo, ValidatorFunctionWrapHandler, field_validator
from pydantic_core import PydanticSerializationError, to_json

from keye.config.codes import JobState
from keye.config.contract import Asked, Report, describe_faults, version_needed
from keye.config.event import EVENT
from keye.config.faults import InvalidJob, UnknownSchemaVersion
from keye.config.job import DEFAULT_MAX_ATTEMPTS, AnalysisJob, JobId, Lifetime, Priority, Traceparent, VideoPart
from keye.config.outcome import OUTCOME

# The newest that this release reads and seals. Raised by a job's new field or value, never by reports.
SCHEMA_VERSION = 2
# Of a sealed job as JSON. Pictures and text have bounds of their own (`keye.config.job`), together a little below it.
MAX_SEALED_BYTES = 16 * 2**20
# Commas and brackets of a message before it is parsed. Each makes an object of 60 bytes or more; a job of the longest
# text has no more commas than that has letters.
MAX_JSON_PARTS = 1_500_000


class SealedJob(Asked):
    """A job with its identity. `submitted_at` is Unix seconds of the producer's clock; its record has the server's.

    `schema_version` is the lowest that knows all that the job uses: older workers go on reading whatever they can.
    """

    schema_version: int = 1
    job_id: JobId
    submitted_at: float
    job: AnalysisJob

    @property
    def record(self) -> dict[str, str]:
        return record_of(self.job, self.submitted_at, self.model_dump_json())


def seal(job: AnalysisJob, is_new: bool = False) -> SealedJob:
    """Give the job its id and its time of submission. Raises `InvalidJob` where it cannot be sent as JSON.

    One that `is_new` was never out of our hands, and is not checked once more, which takes longer than all the rest.
    """
    make = SealedJob.model_construct if is_new else SealedJob
    sealed = make(schema_version=version_needed(job), job_id=str(uuid.uuid4()), submitted_at=time.time(), job=job)
    _to_json(sealed)
    return sealed


def open_sealed(payload: Any) -> SealedJob:
    """Read a sealed job from decoded JSON.

    Raises `UnknownSchemaVersion` before anything else is looked at, then `InvalidJob` with every fault at once.
    """
    version = payload.get("schema_version") if isinstance(payload, dict) else None
    if isinstance(version, int) and not 1 <= version <= SCHEMA_VERSION:
        raise UnknownSchemaVersion(
            f"The job has schema version {version}, this release reads up to {SCHEMA_VERSION}. Upgrade the older side.",
            version > SCHEMA_VERSION,
        )
    text = _to_json(payload)
    try:
        # As JSON, not as Python objects: a list is then a tuple, and a number written as a string is a fault.
        return SealedJob.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise InvalidJob(describe_faults(error)) from None


def _to_json(value: Any) -> bytes:
    """Raises `InvalidJob` where JSON cannot hold it, or it is too large."""
    try:
        text = to_json(value)
    except (PydanticSerializationError, ValueError, RecursionError):
        # Python's JSON reader and its texts let through what JSON cannot hold.
        raise InvalidJob("1 fault: job: holds half a character (a lone surrogate), or is nested too deeply") from None

    if len(text) > MAX_SEALED_BYTES:
        raise InvalidJob(f"1 fault: job: {len(text)} bytes of JSON, the limit is {MAX_SEALED_BYTES}")
    return text


def schemas() -> dict[str, dict[str, Any]]:
    """JSON Schemas for producers in other languages: what they send, and what they read back."""
    return {"job": SealedJob.model_json_schema(), "outcome": OUTCOME.json_schema(), "event": EVENT.json_schema()}


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
    max_attempts: Annotated[int, Field(ge=1)] | None = None
    idempotency_key: Annotated[str, Field(min_length=1)] | None = None
    metadata: dict[str, JsonValue] = Field(default_factory=dict)
    traceparent: Traceparent | None = None
    result_ttl_seconds: Lifetime | None = None


class Outline(_Lenient):
    """Of `SealedJob`, whatever release sealed it and however broken it is: what cannot be read is as if left out."""

    job_id: JobId | None = None
    submitted_at: float | None = None
    job: JobOutline = JobOutline()

    @classmethod
    def of(cls, payload: Any) -> Self:
        """Never raises, whatever decoded JSON it is given."""
        return cls.model_validate(payload) if isinstance(payload, dict) else cls()


def kind_of(job: AnalysisJob) -> str:
    """Jobs of one kind take about as long: as many media, frames and new tokens (of all answers together), each rounded
    up to a power of two."""
    media = job.all_media()
    videos = [part for part in media if isinstance(part, VideoPart)]
    frames = max((part.max_frames or 0 for part in videos), default=0)
    rate = max((part.fps or 0 for part in videos), default=0)
    pixels = max((part.max_pixels or 0 for part in media), default=0)
    new_tokens = sum(each.generation.n * each.generation.max_new_tokens for each in job.by_question())
    counts = (len(media) - len(videos), len(videos), frames, ceil(rate), pixels, new_tokens)
    return ":".join([*(str(num and 1 << (num - 1).bit_length()) for num in counts), job.thinking.value])


def fingerprint_of(job: AnalysisJob) -> str:
    """The same for two jobs that ask for the same thing, within whatever traces, and whatever release sends them."""
    # Producers of 0.2 say the default.
    asked = {"max_attempts": DEFAULT_MAX_ATTEMPTS, **job.model_dump(mode="json", exclude={"traceparent"})}
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def read_sealed(sealed_json: str | None) -> Any:
    """What a record says is asked; None where there is no record, or one that somebody else has written into."""
    try:
        return json.loads(sealed_json or "null")
    except (ValueError, RecursionError):
        return None


def traceparent_of(sealed_json: str) -> str | None:
    return Outline.of(read_sealed(sealed_json)).job.traceparent


def record_of(job: AnalysisJob | JobOutline, submitted_at: float | None, sealed_json: str) -> dict[str, str]:
    """The fields of a job's record (see `keye.config.keys.record`) at the moment of submission, as `sealed_json`."""
    deadline = job.deadline_seconds
    return {
        "kind": kind_of(job) if isinstance(job, AnalysisJob) else "",
        "state": JobState.QUEUED.value,
        "sealed": sealed_json,
        "priority": job.priority.value,
        "submitted_at": "" if submitted_at is None else repr(submitted_at),
        "deadline_at": "" if deadline is None or submitted_at is None else repr(submitted_at + deadline),
        "attempts": "0",
        "max_attempts": str(job.max_attempts or DEFAULT_MAX_ATTEMPTS),
    }
