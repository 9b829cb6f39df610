"""The asking side: `Client(url).submit(...)` gives a `Job`, `Job.result()` its answer. Light: no torch, no worker."""

from keye.config.codes import ErrorCode, JobState, Stage
from keye.config.event import FramesDecoded, JobEnded, JobEvent, StageStarted, TextGenerated
from keye.config.faults import (
    DeadLetterNotFound,
    IdempotencyConflict,
    InvalidJob,
    InvalidSettings,
    JobFailed,
    JobNotEnded,
    JobNotFound,
    KeyeError,
    MessageNotFound,
    QueueUnavailable,
    Refusal,
    UnknownSchemaVersion,
    UploadFailed,
)
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
from keye.config.outcome import JobFailure, JobResult, PartialText
from keye.config.settings import Settings
from keye.producer.client import Client
from keye.producer.job import Cancellation, Job

__all__ = [
    "AnalysisJob",
    "Cancellation",
    "ChatMessage",
    "Client",
    "Content",
    "DeadLetterNotFound",
    "ErrorCode",
    "FramesDecoded",
    "GenerationOptions",
    "IdempotencyConflict",
    "ImagePart",
    "InvalidJob",
    "InvalidSettings",
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
    "MessageNotFound",
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
    "UnknownSchemaVersion",
    "UploadFailed",
    "VideoPart",
]
