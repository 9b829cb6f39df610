"""The words of workers and of whoever runs them: codes, states, stages, devices.

Without pydantic: the engine and the model say them too.
"""

from enum import StrEnum
from typing import Any, Literal, NamedTuple, Self

DeviceSetting = Literal["auto", "cpu", "cuda"]
PrecisionSetting = Literal["auto", "bfloat16", "float16", "float32", "int8", "int4"]
# Of the extra `quantised`.
QUANTISED_BY = {"int8": "torchao", "int4": "bitsandbytes"}


class OpenEnum(StrEnum):
    """A word that this release does not know is kept as it was said, and equals none that it does.

    Of what workers report, to which later releases may add.
    """

    @classmethod
    def _missing_(cls, value: object) -> Any:
        if not isinstance(value, str):
            return None
        word = str.__new__(cls, value)
        word._name_ = word._value_ = value
        return word

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> Any:
        schema = handler(core_schema)
        known = handler.resolve_ref_schema(schema)
        known["examples"] = known.pop("enum")
        return schema


class CodeFacts(NamedTuple):
    """Whose fault a code is, and whether trying again can help."""

    blame: Literal["caller", "media", "service"]
    retryable: bool
    meaning: str


class ErrorCode(OpenEnum):
    """Why a job ended without an answer. Codes stay for ever; the sentences beside them (`facts`) may improve."""

    facts: CodeFacts

    def __new__(cls, word: str, *facts: Any) -> Self:
        code = str.__new__(cls, word)
        code._value_, code.facts = word, CodeFacts(*facts)
        return code

    INVALID_JOB = "INVALID_JOB", "caller", False, "The job does not fit the schema; every fault is listed."
    UNKNOWN_SCHEMA_VERSION = (
        "UNKNOWN_SCHEMA_VERSION",
        "caller",
        False,
        "No worker knew the job's schema version, for KEYE_NEWER_JOB_SECONDS if it is a newer one.",
    )
    PROMPT_TOO_LONG = "PROMPT_TOO_LONG", "caller", False, "Prompt, media and new tokens exceed the model's context."
    MEDIA_NOT_FOUND = "MEDIA_NOT_FOUND", "caller", False, "There is no such file, bucket or key."
    MEDIA_FORBIDDEN = (
        "MEDIA_FORBIDDEN",
        "caller",
        False,
        "The worker may not read it: outside KEYE_MEDIA_ROOTS, no S3 access, or the scheme is off.",
    )
    MEDIA_UNREACHABLE = "MEDIA_UNREACHABLE", "service", True, "The store did not answer in time or broke off."
    MEDIA_UNSUPPORTED = "MEDIA_UNSUPPORTED", "media", False, "It is no image or video of a kind that is decoded here."
    MEDIA_CORRUPT = "MEDIA_CORRUPT", "media", False, "It is damaged so that nothing usable can be decoded."
    MEDIA_TOO_LARGE = "MEDIA_TOO_LARGE", "media", False, "It exceeds a limit on bytes, pixels, memory or decoding time."
    ANSWER_INCOMPLETE = (
        "ANSWER_INCOMPLETE",
        "caller",
        False,
        "The answer did not come to fit its response_schema within max_new_tokens.",
    )
    CANCELLED = "CANCELLED", "caller", False, "The caller cancelled the job."
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED", "caller", False, "The job did not end within its deadline_seconds."
    TIME_LIMIT_EXCEEDED = "TIME_LIMIT_EXCEEDED", "service", True, "A stage or the attempt outlasted its worker's limit."
    OUT_OF_MEMORY = "OUT_OF_MEMORY", "service", True, "The job alone does not fit into the device's memory."
    HOST_FAULT = (
        "HOST_FAULT",
        "service",
        False,
        "The job met a fault of the worker's host, such as a full disk, wherever it ran, and other work did not.",
    )
    WORKER_LOST = "WORKER_LOST", "service", False, "The worker died under the job max_attempts times."
    INTERNAL = "INTERNAL", "service", True, "A fault of the worker itself; its log has the traceback."


# Of a word that is none of these.
ErrorCode.facts = CodeFacts("service", False, "A code of a newer release; the sentence beside it says what it means.")


class JobState(OpenEnum):
    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    EXPIRED = "EXPIRED"

    @property
    def is_final(self) -> bool:
        return LEGAL_MOVES.get(self) == frozenset()


UNANSWERED = frozenset({JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED})
# RUNNING -> QUEUED: a dead worker's lease ran out, an attempt failed and another is due later, or a worker that drains
# or is sick requeued the job.
LEGAL_MOVES: dict[JobState, frozenset[JobState]] = {
    JobState.QUEUED: UNANSWERED | {JobState.RUNNING},
    JobState.RUNNING: UNANSWERED | {JobState.SUCCEEDED, JobState.QUEUED},
    **dict.fromkeys((JobState.SUCCEEDED, *UNANSWERED), frozenset()),
}


class Stage(OpenEnum):
    QUEUED = "queued"
    OPEN = "open"
    FETCH = "fetch"
    DECODE = "decode"
    PREPARE = "prepare"
    GENERATE = "generate"


class QueuedAgain(OpenEnum):
    """Why a job that ran is queued again: its worker died, its attempt failed and another follows, or its worker ends
    or is sick.
    """

    LOST = "lost"
    RETRY = "retry"
    GIVEN_BACK = "given_back"
