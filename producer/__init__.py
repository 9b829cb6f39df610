"""The asking side: `Client(url).submit(...)` gives a `Job`, `Job.result()` its answer. Light: no torch, no worker."""

from config.error_codes import ErrorCode
from config.event import FramesDecoded, JobEnded, JobEvent, Stage, StageStarted, TextGenerated
from config.job import (
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
from config.outcome import JobFailed, JobFailure, JobResult, PartialText
from config.settings import Settings
from config.state import JobState
from config.wire import InvalidJob
from producer.client import Client
from producer.errors import (
    IdempotencyConflict,
    JobNotEnded,
    JobNotFound,
    KeyeError,
    QueueUnavailable,
    Refusal,
    UploadFailed,
)
from producer.job import Cancellation, Job

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
