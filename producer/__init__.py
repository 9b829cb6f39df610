"""The asking side: `Client(url).submit(...)` gives a `Job`, `Job.result()` its answer. Light: no torch, no worker."""

from config.error_codes import ErrorCode
from config.event import JobEnded, Stage, StageStarted
from config.job import (
    AnalysisJob,
    ChatMessage,
    Content,
    GenerationOptions,
    ImagePart,
    Priority,
    TextPart,
    Thinking,
    VideoPart,
)
from config.outcome import JobFailed, JobFailure, JobResult
from config.settings import Settings
from config.state import JobState
from config.wire import InvalidJob
from producer.client import Client
from producer.errors import IdempotencyConflict, JobNotEnded, JobNotFound, KeyeError, QueueUnavailable
from producer.job import Cancellation, Job

__all__ = [
    "AnalysisJob",
    "Cancellation",
    "ChatMessage",
    "Client",
    "Content",
    "ErrorCode",
    "GenerationOptions",
    "IdempotencyConflict",
    "ImagePart",
    "InvalidJob",
    "Job",
    "JobEnded",
    "JobFailed",
    "JobFailure",
    "JobNotEnded",
    "JobNotFound",
    "JobResult",
    "JobState",
    "KeyeError",
    "Priority",
    "QueueUnavailable",
    "Settings",
    "Stage",
    "StageStarted",
    "TextPart",
    "Thinking",
    "VideoPart",
]
