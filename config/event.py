"""What the worker says while a job runs. Events lie in order on the job's stream; the last one is `ended`."""

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from keye.config.codes import JobState, Stage
from keye.config.contract import Report


class StageStarted(Report):
    """An attempt reached a stage; `at` is Unix time in seconds."""

    type: Literal["stage"] = "stage"
    stage: Stage
    attempt: int
    at: float


class FramesDecoded(Report):
    """`done` of the `total` frames that the model reads of a video are decoded; `media_index` as in a failure."""

    type: Literal["frames"] = "frames"
    media_index: int
    done: int
    total: int
    attempt: int
    at: float


Channel = Literal["reasoning", "answer"]


class TextGenerated(Report):
    """The next text of an attempt's answer or of its reasoning; each channel's texts, joined, are that of the outcome.

    `offset` is the number of characters (code points) that the attempt has written to the channel before; a reader who
    has fewer missed some, and finds all of it in the outcome. `num_tokens` counts both channels, this text included.
    """

    type: Literal["text"] = "text"
    channel: Channel | str
    text: str
    offset: int
    num_tokens: int
    attempt: int
    at: float


class JobEnded(Report):
    """The job reached a final state and its outcome can be read."""

    type: Literal["ended"] = "ended"
    state: JobState
    at: float


JobEvent = Annotated[StageStarted | FramesDecoded | TextGenerated | JobEnded, Field(discriminator="type")]
EVENT: TypeAdapter[JobEvent] = TypeAdapter(JobEvent)


def read_event(event_json: str) -> JobEvent | None:
    """None for an event of a type that this release does not know: a newer worker says it, and it is passed over."""
    try:
        return EVENT.validate_json(event_json)
    except ValidationError as error:
        if [fault["type"] for fault in error.errors(include_input=False)] == ["union_tag_invalid"]:
            return None
        raise
