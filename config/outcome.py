"""How a job ended: a result with its evidence, or a failure a person can act on; and how its attempts before went.

And the line of the log that says so, whoever ended it.
"""

import logging
from typing import Annotated, Literal

from pydantic import Field, JsonValue, TypeAdapter

from keye.config.codes import ErrorCode, JobState, Stage
from keye.config.contract import Report
from keye.config.frame_times import unpack


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
    """`prompt_tokens` counts everything the model read, `visual_tokens` the part of it that came from media, and
    `cached_tokens` the part that was found in the cache: read for another job or question before."""

    prompt_tokens: int
    visual_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


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
    `format` is what the file is (of a video: its container), `rows_corrupt` counts an image's rows that could not be
    read. `warnings` are for a person, and stand among the result's too. Where the job's `content` is auto, `cuts` were
    found, and `frames_still` left out since nothing had moved.

    The file that was decoded had `num_bytes` and this `sha256` (hexadecimal), which of a local file is told only where
    its part asks for a `digest`; instead it had `modified_at` (Unix seconds) and `inode`. `etag`, `version_id` and
    `last_modified` are as the store or the server told them. `content` and `sampling` are as asked; `frame_times` is
    when each frame is shown, packed as `keye.config.frame_times` says.
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
    format: str | None = None
    codec: str | None = None
    rows_corrupt: int = 0
    warnings: tuple[str, ...] = ()
    frames_still: int = 0
    cuts: int | None = None
    num_bytes: int | None = None
    sha256: str | None = None
    etag: str | None = None
    version_id: str | None = None
    last_modified: str | None = None
    modified_at: float | None = None
    inode: int | None = None
    content: str | None = None
    sampling: str | None = None
    frame_times: str | None = None

    @property
    def frame_times_seconds(self) -> tuple[float, ...]:
        """When each frame that was read is shown, from the clip's first on; of an image none.

        They are exact unless `frame_times` begins with "~".
        """
        return () if self.frame_times is None else unpack(self.frame_times, self.frames)


class ModelIdentity(Report):
    """`attention` is the form that the engine found right on its device, for sequences and for images.

    `checkpoint` tells one folder of weights from another (see `keye.worker.model.checkpoint_digest`), `packages` are
    what decides numbers, as in `torch==2.11.0`.
    """

    name: str
    model_type: str
    precision: str
    attention: str | None = None
    checkpoint: str | None = None
    packages: tuple[str, ...] = ()


class Generation(Report):
    """How the answer was made, what the job left open included: from the checkpoint, and the seed drawn for it."""

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    stop: tuple[str, ...]
    seed: int
    thinking: str
    max_thinking_tokens: int | None = None
    min_tokens: int = 0


class TokenLogprob(Report):
    """A token that was written: its text (half a character is shown as U+FFFD), and the natural logarithm of how
    probable the model thought it, before any option of sampling."""

    token_id: int
    token: str
    logprob: float


class WorkerIdentity(Report):
    host: str
    pid: int
    device: str

    @property
    def name(self) -> str:
        """As records and histories call the worker."""
        return f"{self.host}:{self.pid}"


class Answer(Report):
    """One of the answers to a job of several; fields as in `JobResult`. `question` and `sample` count from 0."""

    kind: Literal["answer"] = "answer"
    question: int
    sample: int
    answer: str
    reasoning: str | None
    raw_text: str
    finish_reason: Literal["stop", "length"] | str
    usage: TokenUsage
    first_token_seconds: float | None
    generation: Generation
    analysis: str | None = None
    parsed: JsonValue = None
    logprobs: tuple[TokenLogprob, ...] | None = None


class Unanswered(Report):
    """In the place of an answer that could not be given, whatever became of the others."""

    kind: Literal["unanswered"] = "unanswered"
    question: int
    sample: int
    code: ErrorCode
    message: str


class JobResult(Report):
    """`raw_text` is all the model wrote; `analysis` (in a sentence or two, whether to think), `reasoning` and `answer`
    are its parts, tags removed. Workers before 0.3 told the analysis as part of the reasoning.

    `warnings` are for a person: what may make the answer worse than it could be. `parsed` is what the answer says where
    the job has a `response_schema`: what the JSON says, or the text that fits.

    Of a job with `questions`, or with `n` above 1, `answers` holds all, question by question; what stands here is then
    the first that was answered, and `usage` counts all of them.
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
    generation: Generation | None = None
    analysis: str | None = None
    parsed: JsonValue = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    answers: tuple[Annotated[Answer | Unanswered, Field(discriminator="kind")], ...] = ()

    @property
    def state(self) -> JobState:
        return JobState.SUCCEEDED


class PartialText(Report):
    """What the model had written when it was stopped, parted as in a `JobResult`; the last block may be cut short."""

    answer: str
    reasoning: str | None
    raw_text: str
    completion_tokens: int
    analysis: str | None = None


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
        named = {ErrorCode.CANCELLED: JobState.CANCELLED, ErrorCode.DEADLINE_EXCEEDED: JobState.EXPIRED}
        return named.get(self.code, JobState.FAILED)

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


Outcome = Annotated[JobResult | JobFailure, Field(discriminator="kind")]
OUTCOME: TypeAdapter[JobResult | JobFailure] = TypeAdapter(Outcome)


def log_end(log: logging.Logger, outcome: JobResult | JobFailure, **facts: object) -> None:
    """The record of the job's last move; `facts` are further fields of it."""
    facts |= {"job_id": outcome.job_id, "attempt": outcome.attempts, "state": outcome.state}
    why = ""
    if isinstance(outcome, JobFailure):
        facts |= {"stage": outcome.stage, "code": outcome.code}
        # Quoted and cut: it may name what a caller named, line breaks and all.
        why = f" in {outcome.stage}: {outcome.code}: {outcome.message!r:.500}"
    log.info("job %s: %s, attempt %d%s", outcome.job_id, outcome.state, outcome.attempts, why, extra=facts)
