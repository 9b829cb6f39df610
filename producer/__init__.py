"""The asking side: `Client(url).submit(...)` gives a `Job`, `Job.result()` its answer. Light: no torch, no worker."""

from keye.config.event import FramesDecoded, JobEnded, JobEvent, StageStarted, TextGenerated
from keye.config.job import (
    AnalysisJob,
    ChatMessage,
    Content,
    GenerationOptions,
    ImagePart,
    Priority,
    Sampling,
    TextPart,
    Thinking,
    VideoPart,
)
from keye.config.outcome import ErrorCode, JobFailed, JobFailure, JobResult, JobState, PartialText, Stage
from keye.config.settings import Settings
from keye.config.wire import InvalidJob
from keye.producer.client import Client
from keye.producer.errors import (
    IdempotencyConflict,
    JobNotEnded,
    JobNotFound,
    KeyeError,
    QueueUnavailable,
    Refusal,
    UploadFailed,
)
from keye.producer.job import Cancellation, Job

__all__ = [
    "AnalysisJob",
    "Cancellation",
    "ChatMessage",
    "Client",
    "Content",
    "ErrorCode",
    "FramesDecoded",
    "GenerationOptions",
    "IdempotencyConflict",
    "ImagePart",
    "InvalidJob",
    "Job",
    "JobEnded",
    "JobEvent",
    "JobFailed",
    "JobFailure",
    "JobNotEnded",
    "JobNotFound",
    "JobResult",
    "JobState",
    "KeyeError",
    "PartialText",
    "Priority",
    "QueueUnavailable",
    "Refusal",
    "Sampling",
    "Settings",
    "Stage",
    "StageStarted",
    "TextGenerated",
    "TextPart",
    "Thinking",
    "UploadFailed",
    "VideoPart",
]
