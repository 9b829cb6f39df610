"""What the worker says while a job runs. Events lie in order on the job's stream; the last one is `ended`."""

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from config.contract import Contract
from config.state import JobState


class Stage(StrEnum):
    QUEUED = "queued"
    OPEN = "open"
    FETCH = "fetch"
    DECODE = "decode"
    PREPARE = "prepare"
    GENERATE = "generate"


class StageStarted(Contract):
    """An attempt reached a stage; `at` is Unix time in seconds."""

    type: Literal["stage"] = "stage"
    stage: Stage
    attempt: int
    at: float


class FramesDecoded(Contract):
    """`done` of the `total` frames that the model reads of a video are decoded; `media_index` as in a failure."""

    type: Literal["frames"] = "frames"
    media_index: int
    done: int
    total: int
    attempt: int
    at: float


Channel = Literal["reasoning", "answer"]


class TextGenerated(Contract):
    """The next text of an attempt's answer or of its reasoning; each channel's texts, joined, are that of the outcome.

    `offset` is the number of characters (code points) that the attempt has written to the channel before; a reader who
    has fewer missed some, and finds all of it in the outcome. `num_tokens` counts both channels, this text included.
    """

    type: Literal["text"] = "text"
    channel: Channel
    text: str
    offset: int
    num_tokens: int
    attempt: int
    at: float


class JobEnded(Contract):
    """The job reached a final state and its outcome can be read."""

    type: Literal["ended"] = "ended"
    state: JobState
    at: float


JobEvent = Annotated[StageStarted | FramesDecoded | TextGenerated | JobEnded, Field(discriminator="type")]
EVENT: TypeAdapter[JobEvent] = TypeAdapter(JobEvent)
