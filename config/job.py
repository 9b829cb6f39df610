"""What a caller asks for: media, a prompt or a chat, and how to answer; and what may be a job's id."""

import json
import os
import re
from enum import StrEnum
from typing import Annotated, Any, Literal, Self, TypeGuard

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from keye.config.contract import Contract, added_in, describe_faults
from keye.config.faults import InvalidJob

MAX_MEDIA = 64
MAX_METADATA_BYTES = 16 * 1024
MAX_INLINE_BYTES = 2**20  # of one `data:` URI, decoded
MAX_INLINE_URI_CHARS = 12 * 2**20  # of all `data:` URIs of a job together: 9 MiB as base64
MAX_URI_BYTES = 4096  # of any other URI: Linux' PATH_MAX, and more than S3 lets a key have
# Of all that is to be read or matched as text, as UTF-8: eight bytes for each token of the longest context there is.
MAX_TEXT_BYTES = 2**20
# Of a job that does not say how many it may have.
DEFAULT_MAX_ATTEMPTS = 3
SCHEMES = ("s3", "file", "data", "https")
_TO_SEND = 'To send a file itself, give the client {"type": ..., "uri": Path(...)}'


def _is_whole(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half a character (a lone surrogate)") from None
    return text


def _is_no_path(uri: Any) -> Any:
    if isinstance(uri, os.PathLike):
        raise ValueError(f"is a path. {_TO_SEND}; of one that workers find on their own disk, give str(path)")
    return uri


def is_traceparent(value: Any) -> TypeGuard[str]:
    """As W3C's Trace Context has it: version, trace, parent and flags."""
    return (
        isinstance(value, str) and re.fullmatch("[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}", value) is not None
    )


def _is_of_a_trace(value: str) -> str:
    if not is_traceparent(value):
        raise ValueError("is no traceparent: that is 00-<32 hex digits>-<16 hex digits>-<2 hex digits>, in lower case")
    return value


# Python's `str` may hold what neither JSON nor Redis can. No type of pydantic's: the schema is the same without.
Text = Annotated[str, AfterValidator(_is_whole)]
SomeText = Annotated[str, Field(min_length=1), AfterValidator(_is_whole)]
Uri = Annotated[str, Field(min_length=1, max_length=4 * 1024 * 1024), BeforeValidator(_is_no_path)]
Pixels = Annotated[int, Field(ge=28 * 28)]
Side = Annotated[int, Field(ge=28, le=16384)]
# Seconds, far beyond what anybody waits for, and still what Redis can count.
Lifetime = Annotated[int, Field(ge=60, le=3650 * 86400)]
Traceparent = Annotated[str, AfterValidator(_is_of_a_trace)]
# None is left out of JSON, where workers before 0.3 refuse null, and take the default where there is nothing.
Attempts = Annotated[
    Annotated[int, Field(ge=1, le=10)] | None, WithJsonSchema({"type": "integer", "minimum": 1, "maximum": 10})
]


class Priority(StrEnum):
    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


class Thinking(StrEnum):
    """`auto` lets the model decide whether to reason before it answers."""

    AUTO = "auto"
    THINK = "think"
    NO_THINK = "no_think"


class Content(StrEnum):
    """What a video shows decides how many frames a second are worth reading.

    `auto` finds out: of the model's own 2 a second, those in which something has moved, and the first of each scene.
    """

    ACTION = "action"
    STATIC = "static"
    DIALOGUE = "dialogue"
    HD = "hd"
    AUTO = "auto"

    @property
    def added_in(self) -> int:
        """See `version_needed`."""
        return 2 if self is Content.AUTO else 1


class Sampling(StrEnum):
    """`even` reads the frame on screen at each of evenly spread times; `keyframes` the keyframe before it, which costs
    a fraction of the decoding and gives approximate times: for overviews of long videos."""

    EVEN = "even"
    KEYFRAMES = "keyframes"


class Asked(Contract):
    """What a caller makes himself: `InvalidJob` where it is faulty, with every fault.

    It is checked again as part of another: a copy that was changed, or metadata that was filled later, never was.
    """

    model_config = ConfigDict(revalidate_instances="always")

    def __init__(self, /, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise InvalidJob(describe_faults(error)) from None

    # To pydantic it is its own: it would call another for each model within a model, and lose the places of faults.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


class MediaPart(Asked):
    """One image or video: `s3://bucket/key`, `file:///path`, an absolute path, `data:`, or `https://` where allowed.

    The model sees it at no fewer than `min_pixels` and no more than `max_pixels` (width x height, per frame), or at
    exactly `resized_height` x `resized_width`, rounded to the patch grid. Unset limits come from the checkpoint.
    `digest` has the worker read a local file once more, so that the result tells its SHA-256, as it does of others.
    """

    stands_in = "a part of media"

    uri: Uri
    min_pixels: Pixels | None = None
    max_pixels: Pixels | None = None
    resized_height: Side | None = None
    resized_width: Side | None = None
    digest: bool = added_in(2, default=False)

    @field_validator("uri")
    @classmethod
    def _known_scheme(cls, uri: str) -> str:
        scheme, separator, _ = uri.partition(":")
        if uri.startswith("/") or (separator and scheme.lower() in SCHEMES):
            size = len(uri.encode(errors="replace"))
            if scheme.lower() != "data" and size > MAX_URI_BYTES:
                raise ValueError(f"a URI of {size} bytes, the limit is {MAX_URI_BYTES}")
            return uri
        # The value stays out of the message: a signed URL is a secret.
        sentence = f"neither an absolute path nor one of {', '.join(f'{s}:' for s in SCHEMES)}"
        if scheme.lower() == "http":
            sentence += ". What is at http: give as https:, or upload it"
        raise ValueError(sentence if separator else f"{sentence}. {_TO_SEND}")

    @model_validator(mode="after")
    def _sizes_agree(self) -> Self:
        if (self.resized_height is None) != (self.resized_width is None):
            raise ValueError("resized_height and resized_width go together: give both or neither")
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels {self.min_pixels} is above max_pixels {self.max_pixels}")
        return self


class ImagePart(MediaPart):
    type: Literal["image"] = "image"


class VideoPart(MediaPart):
    """`fps` frames are read a second, or as many as `content` asks for; neither means the model's own 2 a second."""

    stands_in = 'a video of media, as in {"type": "video", "uri": "s3://bucket/key", "fps": 1}'

    type: Literal["video"] = "video"
    fps: Annotated[float, Field(gt=0, le=60)] | None = None
    content: Content | None = None
    sampling: Sampling = Sampling.EVEN
    max_frames: Annotated[int, Field(ge=1, le=4096)] | None = None
    start_seconds: Annotated[float, Field(ge=0)] | None = None
    end_seconds: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _sampling_agrees(self) -> Self:
        if self.fps is not None and self.content is not None:
            raise ValueError("fps and content both set the frame rate: give one of them")
        if self.end_seconds is not None and self.end_seconds <= (self.start_seconds or 0):
            raise ValueError(f"end_seconds {self.end_seconds} is not after start_seconds {self.start_seconds or 0}")
        return self


class TextPart(Asked):
    type: Literal["text"] = "text"
    text: Text


AnyMedia = Annotated[ImagePart | VideoPart, Field(discriminator="type")]
AnyPart = Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="type")]


class ChatMessage(Asked):
    stands_in = "a message"
    role: Literal["system", "user", "assistant"]
    content: Text | tuple[AnyPart, ...]


class GenerationOptions(Asked):
    """Unset sampling options take the checkpoint's `generation_config.json`; `temperature` 0 is greedy, as is all below
    a millionth. A `repetition_penalty` below that counts as a millionth.

    `max_thinking_tokens` bounds what stands between `<think>` and `</think>`: once so many are written the block is
    closed and the answer begun. 0 is an empty block.
    """

    stands_in = 'generation, as in {"generation": {"max_new_tokens": 256}}'

    max_new_tokens: Annotated[int, Field(ge=1, le=131072)] = 1024
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = None
    stop: Annotated[tuple[SomeText, ...], Field(max_length=8)] = ()
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    max_thinking_tokens: Annotated[int, Field(ge=0, le=131072)] | None = added_in(2, None)


class AnalysisJob(Asked):
    """One question about some media: either `media` and a `prompt`, or full chat `messages` that hold their media.

    `max_attempts` bounds all attempts together. Without it workers may die under the job twice and it is tried again,
    and unreachable media are tried for as long as the workers' settings say.
    `result_ttl_seconds` is how long all that is kept of the job stays once it has ended, also where it failed; without
    it the workers' settings say.
    `traceparent` names the caller's trace (W3C Trace Context) in the workers' logs.
    """

    stands_in = "the job itself"

    media: Annotated[tuple[AnyMedia, ...], Field(max_length=MAX_MEDIA)] = ()
    prompt: SomeText | None = None
    messages: Annotated[tuple[ChatMessage, ...], Field(min_length=1)] | None = None
    thinking: Thinking = Thinking.AUTO
    generation: GenerationOptions = GenerationOptions()
    priority: Priority = Priority.NORMAL
    deadline_seconds: Annotated[float, Field(gt=0, le=7 * 86400)] | None = None
    max_attempts: Attempts = Field(default=None, exclude_if=lambda most: most is None)
    idempotency_key: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    metadata: dict[str, JsonValue] = Field(default_factory=dict)
    traceparent: Traceparent | None = added_in(2, None)
    result_ttl_seconds: Lifetime | None = added_in(2, None)

    @field_validator("metadata")
    @classmethod
    def _metadata_is_small(cls, metadata: dict[str, Any]) -> dict[str, Any]:
        try:
            size = len(json.dumps(metadata, allow_nan=False))
            json.dumps(metadata, ensure_ascii=False).encode()
        except (ValueError, RecursionError):
            # Without the error's own words: they may quote what it holds.
            reason = "metadata is no JSON: it holds NaN, an infinity, half a character, or is nested too deeply"
            raise ValueError(reason) from None
        if size > MAX_METADATA_BYTES:
            raise ValueError(f"metadata is {size} bytes of JSON, the limit is {MAX_METADATA_BYTES}: store a reference")
        return metadata

    @model_validator(mode="after")
    def _asks_one_thing(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt (with media) or messages, not both and not neither")
        if self.messages is not None:
            if self.media:
                raise ValueError("with messages, put the media into the messages' content")
            if self.messages[-1].role != "user":
                raise ValueError(f"the last message must be the user's, it is the {self.messages[-1].role}'s")
            if len(self.all_media()) > MAX_MEDIA:
                raise ValueError(f"{len(self.all_media())} media in the messages, the limit is {MAX_MEDIA}")
        return self

    @model_validator(mode="after")
    def _is_of_a_size(self) -> Self:
        texts = [p.text if isinstance(p, TextPart) else "" for p in self.all_parts()]
        size = sum(len(text.encode(errors="replace")) for text in (*texts, *self.generation.stop))
        if size > MAX_TEXT_BYTES:
            raise ValueError(f"prompt, messages and stop are {size} bytes of text, the limit is {MAX_TEXT_BYTES}")
        inline = sum(len(part.uri) for part in self.all_media() if part.uri[:5].lower() == "data:")
        if inline > MAX_INLINE_URI_CHARS:
            raise ValueError(f"{inline} characters of data: URIs, a job may have {MAX_INLINE_URI_CHARS}: upload them")
        return self

    def conversation(self) -> tuple[ChatMessage, ...]:
        """The job as chat messages; a plain prompt is one user turn with its media before the text."""
        return self.messages or (ChatMessage(role="user", content=self.all_parts()),)

    def all_parts(self) -> tuple[TextPart | ImagePart | VideoPart, ...]:
        """All that the model is shown, in prompt order."""
        if self.messages is None:
            return (*self.media, TextPart(text=self.prompt or ""))
        contents = [message.content for message in self.messages]
        return tuple(p for c in contents for p in ((TextPart(text=c),) if isinstance(c, str) else c))

    def all_media(self) -> tuple[ImagePart | VideoPart, ...]:
        """Every medium in prompt order; a failure's `media_index` counts in this list."""
        return tuple(part for part in self.all_parts() if not isinstance(part, TextPart))


RULE = "1 to 128 letters, digits, dots, colons, hyphens and underscores, and not :events at its end"


def is_job_id(value: Any) -> TypeGuard[str]:
    # The stream of a job's events has :events behind the key of its record.
    return isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9._:-]{1,128}(?<!:events)", value) is not None


def _of_the_kind(job_id: str) -> str:
    if not is_job_id(job_id):
        raise ValueError(f"an id is {RULE}")
    return job_id


# No pattern for pydantic: as part of the schema it would count as growth, which it is not.
JobId = Annotated[str, AfterValidator(_of_the_kind)]
