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


class JobEnded(Contract):
    """The job reached a final state and its outcome can be read."""

    type: Literal["ended"] = "ended"
    state: JobState
    at: float


JobEvent = Annotated[StageStarted | JobEnded, Field(discriminator="type")]
EVENT: TypeAdapter[StageStarted | JobEnded] = TypeAdapter(JobEvent)
