"""How a job ended: a result with its evidence, or a failure a person can act on.

Why a job ended without an answer: stable codes, whose fault each is, and whether trying again can help.

The states of a job and the only moves between them.

What became of the attempts at a job before its last: one entry each, in the job's record.
"""

from typing import Annotated, Literal, NamedTuple

from pydantic import Field, JsonValue, TypeAdapter

from keye.config.contract import OpenEnum, Report

Blame = Literal["caller", "media", "service"]


class CodeFacts(NamedTuple):
    blame: Blame
    retryable: bool
    meaning: str


class ErrorCode(OpenEnum):
    """Codes stay for ever; the sentences beside them (`facts`) may improve."""

    INVALID_JOB = "INVALID_JOB"
    UNKNOWN_SCHEMA_VERSION = "UNKNOWN_SCHEMA_VERSION"
    PROMPT_TOO_LONG = "PROMPT_TOO_LONG"
    MEDIA_NOT_FOUND = "MEDIA_NOT_FOUND"
    MEDIA_FORBIDDEN = "MEDIA_FORBIDDEN"
    MEDIA_UNREACHABLE = "MEDIA_UNREACHABLE"
    MEDIA_UNSUPPORTED = "MEDIA_UNSUPPORTED"
    MEDIA_CORRUPT = "MEDIA_CORRUPT"
    MEDIA_TOO_LARGE = "MEDIA_TOO_LARGE"
    CANCELLED = "CANCELLED"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    TIME_LIMIT_EXCEEDED = "TIME_LIMIT_EXCEEDED"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    WORKER_LOST = "WORKER_LOST"
    INTERNAL = "INTERNAL"

    @property
    def facts(self) -> CodeFacts:
        return _FACTS.get(self, _UNKNOWN)


_UNKNOWN = CodeFacts("service", False, "A code of a newer release; the sentence beside it says what it means.")

_FACTS = {
    ErrorCode.INVALID_JOB: CodeFacts("caller", False, "The job does not fit the schema; every fault is listed."),
    ErrorCode.UNKNOWN_SCHEMA_VERSION: CodeFacts(
        "caller", False, "No worker knew the job's schema version, for KEYE_NEWER_JOB_SECONDS if it is a newer one."
    ),
    ErrorCode.PROMPT_TOO_LONG: CodeFacts(
        "caller", False, "Prompt, visual tokens and new tokens together exceed the model's context."
    ),
    ErrorCode.MEDIA_NOT_FOUND: CodeFacts("caller", False, "There is no such file, bucket or key."),
    ErrorCode.MEDIA_FORBIDDEN: CodeFacts(
        "caller", False, "The worker may not read it: outside KEYE_MEDIA_ROOTS, no S3 access, or the scheme is off."
    ),
    ErrorCode.MEDIA_UNREACHABLE: CodeFacts("service", True, "The store did not answer in time or broke off."),
    ErrorCode.MEDIA_UNSUPPORTED: CodeFacts("media", False, "It is no image or video of a kind that is decoded here."),
    ErrorCode.MEDIA_CORRUPT: CodeFacts("media", False, "It is damaged so that nothing usable can be decoded."),
    ErrorCode.MEDIA_TOO_LARGE: CodeFacts(
        "media", False, "It exceeds a limit on bytes, pixels, memory or decoding time."
    ),
    ErrorCode.CANCELLED: CodeFacts("caller", False, "The caller cancelled the job."),
    ErrorCode.DEADLINE_EXCEEDED: CodeFacts("caller", False, "The job did not end within its deadline_seconds."),
    ErrorCode.TIME_LIMIT_EXCEEDED: CodeFacts(
        "service", True, "A stage, or the whole attempt, took longer than this worker lets one take."
    ),
    ErrorCode.OUT_OF_MEMORY: CodeFacts("service", True, "The job alone does not fit into the device's memory."),
    ErrorCode.WORKER_LOST: CodeFacts("service", False, "The worker died under the job max_attempts times."),
    ErrorCode.INTERNAL: CodeFacts("service", True, "A fault of the worker itself; its log has the traceback."),
}


class JobState(OpenEnum):
    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    EXPIRED = "EXPIRED"

    @property
    def is_final(self) -> bool:
        return LEGAL_MOVES.get(self) == frozenset()


# RUNNING -> QUEUED: a dead worker's lease ran out, an attempt failed and another is due later, or a draining worker
# gave the job back.
LEGAL_MOVES: dict[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.RUNNING, JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED}),
    JobState.RUNNING: frozenset(
        {JobState.QUEUED, JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED}
    ),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset(),
    JobState.CANCELLED: frozenset(),
    JobState.EXPIRED: frozenset(),
}


class Stage(OpenEnum):
    QUEUED = "queued"
    OPEN = "open"
    FETCH = "fetch"
    DECODE = "decode"
    PREPARE = "prepare"
    GENERATE = "generate"


class FailedAttempt(Report):
    """An attempt that did not answer the job. Times are Unix seconds of the server's clock; `worker` is host:pid."""

    attempt: int
    worker: str
    began_at: float
    ended_at: float
    stage: Stage
    code: ErrorCode
    message: str


class TokenUsage(Report):
    """`prompt_tokens` counts everything the model read, `visual_tokens` the part of it that came from media."""

    prompt_tokens: int
    visual_tokens: int
    completion_tokens: int


class StageTimings(Report):
    """Seconds spent in each stage of the attempt that settled the job; `queued` is from submission to its claim."""

    queued: float = 0.0
    fetch: float = 0.0
    decode: float = 0.0
    prepare: float = 0.0
    generate: float = 0.0
    total: float = 0.0
    first_token: float | None = None


class MediaSeen(Report):
    """What the model was shown of one medium: sizes are (height, width) in pixels.

    `..._asked` is what the job, or the model's own way with videos, asked for; `reasons` says why less was shown.
    """

    type: Literal["image", "video"] | str
    original_size: tuple[int, int]
    resized_size: tuple[int, int]
    visual_tokens: int
    frames: int = 1
    fps: float | None = None
    duration_seconds: float | None = None
    frames_corrupt: int = 0
    frames_asked: int | None = None
    fps_asked: float | None = None
    size_asked: tuple[int, int] | None = None
    reasons: tuple[str, ...] = ()
    decoder: str | None = None


class ModelIdentity(Report):
    name: str
    model_type: str
    precision: str


class WorkerIdentity(Report):
    host: str
    pid: int
    device: str

    @property
    def name(self) -> str:
        """As records and histories call the worker."""
        return f"{self.host}:{self.pid}"


class JobResult(Report):
    """`raw_text` is all the model wrote; `answer` and `reasoning` are its parts, thinking tags removed.

    `warnings` are for a person: what may make the answer worse than it could be.
    """

    kind: Literal["result"] = "result"
    job_id: str
    answer: str
    reasoning: str | None
    raw_text: str
    finish_reason: Literal["stop", "length"] | str
    usage: TokenUsage
    timings: StageTimings
    media: tuple[MediaSeen, ...]
    model: ModelIdentity
    worker: WorkerIdentity
    attempts: int
    warnings: tuple[str, ...] = ()
    metadata: dict[str, JsonValue] = Field(default_factory=dict)

    @property
    def state(self) -> JobState:
        return JobState.SUCCEEDED


class PartialText(Report):
    """What the model had written when it was stopped, parted as in a `JobResult`; the last block may be cut short."""

    answer: str
    reasoning: str | None
    raw_text: str
    completion_tokens: int


class JobFailure(Report):
    """`stage` is where it went wrong, `media_index` which medium of the job, where one is to blame.

    `partial` is there when the job was cancelled or its deadline passed after the model had begun to write.
    """

    kind: Literal["failure"] = "failure"
    job_id: str
    code: ErrorCode
    message: str
    stage: Stage
    retryable: bool
    attempts: int
    media_index: int | None = None
    partial: PartialText | None = None
    metadata: dict[str, JsonValue] = Field(default_factory=dict)

    @property
    def state(self) -> JobState:
        match self.code:
            case ErrorCode.CANCELLED:
                return JobState.CANCELLED
            case ErrorCode.DEADLINE_EXCEEDED:
                return JobState.EXPIRED
            case _:
                return JobState.FAILED


Outcome = Annotated[JobResult | JobFailure, Field(discriminator="kind")]
OUTCOME: TypeAdapter[JobResult | JobFailure] = TypeAdapter(Outcome)
