"""What the worker says while a job runs. Events lie in order on the job's stream; the last one is `ended`."""

from typing import Annotated, Literal, Self

from pydantic import Field, PrivateAttr, TypeAdapter, ValidationError

from keye.config.codes import ErrorCode, JobState, QueuedAgain, Stage
from keye.config.contract import Report


class Event(Report):
    """What all events have: `id` is where it lies on its stream ("" for one that was not read there)."""

    _id: str = PrivateAttr("")

    @property
    def id(self) -> str:
        """What `events(after=...)` goes on behind."""
        return self._id


class StageStarted(Event):
    """An attempt reached a stage; `at` is Unix time in seconds. `reason` says why one is `queued` again.

    Workers of 0.2 give none.
    """

    type: Literal["stage"] = "stage"
    stage: Stage
    attempt: int
    at: float
    reason: QueuedAgain | None = Field(default=None, exclude_if=lambda reason: reason is None)


class FramesDecoded(Event):
    """`done` of the `total` frames that the model reads of a video are decoded; `media_index` as in a failure."""

    type: Literal["frames"] = "frames"
    media_index: int
    done: int
    total: int
    attempt: int
    at: float


Channel = Literal["analysis", "reasoning", "answer"]


class TextGenerated(Event):
    """The next text of an attempt's analysis, reasoning or answer; each channel's texts, joined, are the outcome's.

    Of a job with several answers each has channels of its own, told by `question` and `sample`; `num_tokens_of_all`
    counts what is written of all of them by then.

    `offset` is the number of characters (code points) that the attempt has written to the channel before; a reader who
    has fewer missed some, and finds all of it in the outcome. `num_tokens` counts all channels, this text included.
    """

    type: Literal["text"] = "text"
    channel: Channel | str
    text: str
    offset: int
    num_tokens: int
    attempt: int
    at: float
    question: int = Field(default=0, exclude_if=lambda question: question == 0)
    sample: int = Field(default=0, exclude_if=lambda sample: sample == 0)
    num_tokens_of_all: int | None = Field(default=None, exclude_if=lambda number: number is None)


class AnswerEnded(Event):
    """One of several answers to a job is complete, or cannot be given: then `code` says why, as in the outcome.

    `num_tokens_of_all` as in `TextGenerated`.
    """

    type: Literal["answered"] = "answered"
    question: int
    sample: int
    code: ErrorCode | None = Field(default=None, exclude_if=lambda code: code is None)
    num_tokens_of_all: int = 0
    attempt: int
    at: float


class JobEnded(Event):
    """The job reached a final state and its outcome can be read."""

    type: Literal["ended"] = "ended"
    state: JobState
    at: float


class Heartbeat(Event):
    """Nothing was said for as long as the reader wanted: it comes from no worker and lies on no stream."""

    type: Literal["heartbeat"] = "heartbeat"
    at: float


class EventsMissing(Event):
    """Here a reader missed some: the stream keeps the newest, and he came late or was slow. Made by who reads.

    `num_missing` is how many: exactly where he had read from the first on, else at the most; None where the server,
    older than 7.0, does not tell. The outcome has all of the text.
    """

    type: Literal["missing"] = "missing"
    num_missing: int | None
    at: float


JobEvent = Annotated[StageStarted | FramesDecoded | TextGenerated | AnswerEnded | JobEnded, Field(discriminator="type")]
EVENT: TypeAdapter[JobEvent] = TypeAdapter(JobEvent)


class EndedJob(Report):
    """A job in the feed of all that end: `id` is where it lies there, `at` Unix seconds of the server's clock."""

    id: str
    job_id: str
    state: JobState
    at: float

    @classmethod
    def of(cls, entry_id: str, fields: dict[str, str]) -> Self:
        return cls.model_validate({**fields, "id": entry_id, "at": int(entry_id.partition("-")[0]) / 1000})


def read_event(event_json: str, entry_id: str = "") -> JobEvent | None:
    """None for an event of a type that this release does not know: a newer worker says it, and it is passed over."""
    try:
        event = EVENT.validate_json(event_json)
    except ValidationError as error:
        if [fault["type"] for fault in error.errors(include_input=False)] == ["union_tag_invalid"]:
            return None
        raise
    event._id = entry_id
    return event
