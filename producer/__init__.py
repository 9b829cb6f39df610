"""The asking side: `Client(url).submit(...)` gives a `Job`, `Job.result()` its answer. Light: no torch, no worker."""

from keye.config.codes import ErrorCode, JobState, QueuedAgain, Stage
from keye.config.event import EndedJob, FramesDecoded, Heartbeat, JobEnded, JobEvent, StageStarted, TextGenerated
from keye.config.faults import (
    DeadLetterNotFound,
    FeedGap,
    IdempotencyConflict,
    InvalidEventId,
    InvalidJob,
    InvalidSettings,
    JobFailed,
    JobNotEnded,
    JobNotFound,
    JobUnreadable,
    KeyeError,
    MessageNotFound,
    QueueFull,
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
from keye.producer.async_client import AsyncClient, AsyncJob
from keye.producer.client import Client
from keye.producer.following import End
from keye.producer.job import Cancellation, Job
from keye.producer.progress import Progress

__all__ = [
    "AnalysisJob",
    "AsyncClient",
    "AsyncJob",
    "Cancellation",
    "ChatMessage",
    "Client",
    "Content",
    "DeadLetterNotFound",
    "End",
    "EndedJob",
    "ErrorCode",
    "FeedGap",
    "FramesDecoded",
    "GenerationOptions",
    "Heartbeat",
    "IdempotencyConflict",
    "ImagePart",
    "InvalidEventId",
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
    "JobUnreadable",
    "KeyeError",
    "MessageNotFound",
    "PartialText",
    "Priority",
    "Progress",
    "QueueFull",
    "QueueUnavailable",
    "QueuedAgain",
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
