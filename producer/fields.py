"""The fields of a job, as loosely as clients take them. For who reads and checks programs; nothing is checked here."""

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import IO, TYPE_CHECKING, Any, Protocol, TypedDict

from pydantic import BaseModel

from keye.config.job import ChatMessage, GenerationOptions, MediaPart, Priority, Question, Thinking

if TYPE_CHECKING:
    from PIL.Image import Image

    class Array(Protocol):
        """Of numpy, or of whoever gives one of its arrays."""

        def __array__(self) -> Any: ...

    File = bytes | bytearray | memoryview | IO[bytes] | Image | Array
    Medium = str | PathLike[str] | File | MediaPart | Mapping[str, Any]


class JobOptions(TypedDict, total=False):
    """How to answer: fields of an `AnalysisJob` that many jobs may share, as loosely as a client takes them."""

    thinking: Thinking | str
    generation: GenerationOptions | Mapping[str, Any]
    priority: Priority | str
    deadline_seconds: float | None
    max_attempts: int | None
    metadata: Mapping[str, Any]
    traceparent: str | None
    result_ttl_seconds: int | None
    response_schema: Mapping[str, Any] | Iterable[str] | str | type[BaseModel] | None


class JobFields(JobOptions, total=False):
    """All fields of an `AnalysisJob`."""

    media: "Medium | Iterable[Medium] | None"
    prompt: str | None
    messages: ChatMessage | Mapping[str, Any] | Iterable[ChatMessage | Mapping[str, Any]] | None
    idempotency_key: str | None
    questions: Sequence[str | Question | Mapping[str, Any]]


class BatchOptions(JobOptions, total=False):
    """Of `Client.submit_batch`."""

    errors: str | PathLike[str] | None
    report: str | PathLike[str] | None
    retry_failed: bool
    max_in_flight: int
    questions: Sequence[str | Question | Mapping[str, Any]]
