"""A job of a batch: as it is given, and as the journal knows of it."""

import json
from collections.abc import Mapping
from enum import IntEnum
from typing import Any, NamedTuple

from keye.config.contract import escaped
from keye.config.faults import InvalidJob

# As long as a key of S3 is.
MAX_CUSTOM_ID_CHARS = 1024


class Line(NamedTuple):
    """A job of a batch as it was given.

    `number` counts the lines of a file from 1, and what a folder or a bucket holds. `start` is where its source finds
    it again. `custom_id` is None where it has none of its own that can be read. `asked` are fields as `Client.submit`
    takes them, or why there are none. `is_openai` is the form of its answer.
    """

    number: int
    start: int | bytes
    custom_id: str | None
    asked: Mapping[str, Any] | InvalidJob
    is_openai: bool = False


class State(IntEnum):
    """`SENDING` may be queued or not, `SENT` is; `UNSENT` is not: it was read, or has failed and is to be run again."""

    SENDING = 0
    SENT = 1
    ANSWERED = 2
    FAILED = 3
    UNSENT = 4


class Row(NamedTuple):
    """A line of which it is not known how it ends; `sent_at` is when it was about to be sent, Unix seconds."""

    number: int
    start: int | bytes
    custom_id: str | None
    is_openai: bool
    state: State
    sent_at: float
    run: int = 0
    owner: str | None = None


class Ended(NamedTuple):
    """How a line ended, `at` that time (Unix seconds); `code` is why without an answer."""

    number: int
    at: float
    seconds: float | None = None
    code: str | None = None


def read_fields(text: bytes) -> dict[str, Any] | InvalidJob:
    """The fields of a job, or why it has none."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as fault:
        # Of a line whose number is told elsewhere, "line 1" would be another.
        where = f"{fault.msg}, character {fault.pos + 1}" if isinstance(fault, json.JSONDecodeError) else str(fault)
        return InvalidJob(f"1 fault: job: is no JSON ({escaped(where)})")
    return fields if isinstance(fields, dict) else InvalidJob("1 fault: job: is no JSON object")


def named(custom_id: Any) -> str:
    """What a line calls its job. Raises `InvalidJob`."""
    try:
        if isinstance(custom_id, str) and 0 < len(custom_id) <= MAX_CUSTOM_ID_CHARS and custom_id.encode():
            return custom_id
    except UnicodeEncodeError:
        pass
    raise InvalidJob(f"1 fault: custom_id: Input should be text of 1 to {MAX_CUSTOM_ID_CHARS} characters")
