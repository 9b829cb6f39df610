"""Why a job ended without an answer: stable codes, whose fault each is, and whether trying again can help."""

from typing import Literal, NamedTuple

from keye.config.open_enum import OpenEnum

Blame = Literal["caller", "media", "service"]


class CodeFacts(NamedTuple):
    blame: Blame
    retryable: bool
    meaning: str


class ErrorCode(OpenEnum):
    """Codes stay for ever; the sentences beside them (`facts`) may improve."""

    INVALID_JOB = "INVALID_JOB"
    UNKNOWN_SCHEMA_VERSION = "UNKNOWN_SCHEMA_VERSION"
    PROMPT_TOO_LONG = "PROMPT_TOO_LONG"
    MEDIA_NOT_FOUND = "MEDIA_NOT_FOUND"
    MEDIA_FORBIDDEN = "MEDIA_FORBIDDEN"
    MEDIA_UNREACHABLE = "MEDIA_UNREACHABLE"
    MEDIA_UNSUPPORTED = "MEDIA_UNSUPPORTED"
    MEDIA_CORRUPT = "MEDIA_CORRUPT"
    MEDIA_TOO_LARGE = "MEDIA_TOO_LARGE"
    CANCELLED = "CANCELLED"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    TIME_LIMIT_EXCEEDED = "TIME_LIMIT_EXCEEDED"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    WORKER_LOST = "WORKER_LOST"
    INTERNAL = "INTERNAL"

    @property
    def facts(self) -> CodeFacts:
        return _FACTS.get(self, _UNKNOWN)


_UNKNOWN = CodeFacts("service", False, "A code of a newer release; the sentence beside it says what it means.")

_FACTS = {
    ErrorCode.INVALID_JOB: CodeFacts("caller", False, "The job does not fit the schema; every fault is listed."),
    ErrorCode.UNKNOWN_SCHEMA_VERSION: CodeFacts(
        "caller", False, "No worker knew the job's schema version, for KEYE_NEWER_JOB_SECONDS if it is a newer one."
    ),
    ErrorCode.PROMPT_TOO_LONG: CodeFacts(
        "caller", False, "Prompt, visual tokens and new tokens together exceed the model's context."
    ),
    ErrorCode.MEDIA_NOT_FOUND: CodeFacts("caller", False, "There is no such file, bucket or key."),
    ErrorCode.MEDIA_FORBIDDEN: CodeFacts(
        "caller", False, "The worker may not read it: outside KEYE_MEDIA_ROOTS, no S3 access, or the scheme is off."
    ),
    ErrorCode.MEDIA_UNREACHABLE: CodeFacts("service", True, "The store did not answer in time or broke off."),
    ErrorCode.MEDIA_UNSUPPORTED: CodeFacts("media", False, "It is no image or video of a kind that is decoded here."),
    ErrorCode.MEDIA_CORRUPT: CodeFacts("media", False, "It is damaged so that nothing usable can be decoded."),
    ErrorCode.MEDIA_TOO_LARGE: CodeFacts(
        "media", False, "It exceeds a limit on bytes, pixels, memory or decoding time."
    ),
    ErrorCode.CANCELLED: CodeFacts("caller", False, "The caller cancelled the job."),
    ErrorCode.DEADLINE_EXCEEDED: CodeFacts("caller", False, "The job did not end within its deadline_seconds."),
    ErrorCode.TIME_LIMIT_EXCEEDED: CodeFacts(
        "service", True, "A stage, or the whole attempt, took longer than this worker lets one take."
    ),
    ErrorCode.OUT_OF_MEMORY: CodeFacts("service", True, "The job alone does not fit into the device's memory."),
    ErrorCode.WORKER_LOST: CodeFacts("service", False, "The worker died under the job max_attempts times."),
    ErrorCode.INTERNAL: CodeFacts("service", True, "A fault of the worker itself; its log has the traceback."),
}
