"""What a delivery says of its job, and what the moves of a lease answer: data alone."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Self, TypeVar

from pydantic import Field

from keye.config.codes import Stage
from keye.config.outcome import Outcome
from keye.config.wire import Outline, SealedJob, record_of

T = TypeVar("T")

# Settling needs it no more, and a spool on disk should not hold it: signed URLs stand in it.
Unsaved = Annotated[T, Field(exclude=True)]


@dataclass(frozen=True, slots=True)
class QueuedJob:
    """What a delivery says about its job: `record` is written where there is none, unless there was (`is_recorded`).

    `is_newer` is one whose schema version only later releases know. `delivery_tag` is of the message that is to be
    acknowledged with the outcome, "" where none is.
    """

    job_id: str
    record: Mapping[str, str]
    idempotency_key: str | None = None
    result_ttl_seconds: int | None = None
    is_newer: bool = False
    is_recorded: bool = False
    delivery_tag: str = ""

    @classmethod
    def of(cls, sealed: SealedJob) -> Self:
        return cls(sealed.job_id, sealed.record, sealed.job.idempotency_key, sealed.job.result_ttl_seconds)

    @classmethod
    def unreadable(cls, outline: Outline, job_id: str, payload_json: str, is_newer: bool = False) -> Self:
        """A job that is left to others or claimed only to be failed. Its key, where it has one, must end with it."""
        job = outline.job
        record = record_of(job, outline.submitted_at, payload_json)
        return cls(job_id, record, job.idempotency_key, job.result_ttl_seconds, is_newer)


@dataclass(frozen=True, slots=True)
class Claimed:
    """The right to settle one job, for as long as `token` is the record's newest. Times are the server's Unix seconds.

    Every move of a lease makes a new token, drawn at random: a counter could repeat after a server that lost its last
    second. `max_attempts` is the job's own and one more for each that does not count. `submitted_at` and
    `deadline_at`, None where unknown or unset, are as a producer that is not ours wrote them. `max_visual_tokens` is
    set where an earlier attempt had more and did not fit into memory, `unreachable_since` where `num_unreachable`
    earlier ones did not get the media; it is the end of the first. `host_faults` is how often it met a fault of a host
    that was then found fit, by place; `is_alone` where nothing runs beside it, `waits` where its record says that it
    waits for a place among few like it, whose worker died once. `sealed_json` is what the record says is asked,
    `canvas_json` what is to be called afterwards, if anything is; `delivery_tag` is the `QueuedJob`'s.
    """

    job_id: str
    token: str
    attempt: int
    max_attempts: int
    claimed_at: float
    submitted_at: float | None
    deadline_at: float | None
    idempotency_key: str | None
    result_ttl_seconds: int | None = None
    max_visual_tokens: int | None = None
    unreachable_since: Unsaved[float | None] = None
    num_unreachable: Unsaved[int] = 0
    host_faults: Unsaved[Mapping[str, int]] = field(default_factory=dict, compare=False)
    is_alone: Unsaved[bool] = field(default=False, compare=False)
    waits: Unsaved[bool] = field(default=False, compare=False)
    sealed_json: Unsaved[str] = field(default="null", repr=False, compare=False)
    canvas_json: Unsaved[str | None] = field(default=None, repr=False, compare=False)
    delivery_tag: Unsaved[str] = field(default="", compare=False)

    @property
    def queued_seconds(self) -> float:
        return 0.0 if self.submitted_at is None else max(0.0, self.claimed_at - self.submitted_at)

    @property
    def seconds_to_deadline(self) -> float | None:
        """Counted from the claim; negative when it came too late."""
        return None if self.deadline_at is None else self.deadline_at - self.claimed_at


@dataclass(frozen=True, slots=True)
class AlreadySettled:
    """Another attempt, a cancel or the reaper ended the job: this delivery has nothing to do."""

    outcome: Outcome
    canvas_json: str | None = None


@dataclass(frozen=True, slots=True)
class HeldElsewhere:
    """Some worker is on it, or its attempt is not due yet; when it is, the reaper publishes the job again."""


@dataclass(frozen=True, slots=True)
class Forgotten:
    """The job has ended, so long ago that its record is gone: this delivery has nothing to do."""


@dataclass(frozen=True, slots=True)
class Suspect:
    """It may be what killed workers or failed their hosts, so it runs alone: claim it again when nothing else runs."""


@dataclass(frozen=True, slots=True)
class Requeued:
    """A job that needs a message, and is reaped again if it gets none.

    Its worker died, or (`dead_worker` is None) another attempt is due, its producer died before it was published, its
    message was lost, or it ended while it waited. `stage` is the last that the dead worker told of, in `attempt`.
    """

    job_id: str
    sealed_json: str
    dead_worker: str | None
    priority: str
    token: str
    stage: Stage = Stage.QUEUED
    attempt: int = 0


@dataclass(frozen=True, slots=True)
class LateJob:
    """One whose deadline has passed, and that had not ended a moment ago; `attempt` is its last, 0 where none began."""

    job_id: str
    sealed_json: str
    attempt: int


@dataclass(frozen=True, slots=True)
class TakenOver:
    """A dead worker's job that may not run again: the reaper now holds it and must settle it.

    `stage` is the last one the dead worker told of.
    """

    lease: Claimed
    dead_worker: str
    stage: Stage
    cancel_requested: bool
