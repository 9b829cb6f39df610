"""What a caller asks for: media, a prompt or a chat, and how to answer; and what may be a job's id."""

import json
import os
import re
from enum import StrEnum
from typing import Annotated, Any, Literal, Self, TypeGuard

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    GetCoreSchemaHandler,
    JsonValue,
    ValidationInfo,
    WithJsonSchema,
    field_serializer,
    field_validator,
    model_validator,
)
from pydantic_core import core_schema, to_json

from keye.config.contract import Asked, added_in
from keye.config.response_schema import ResponseSchema
from keye.config.text import SomeText, Text

MAX_MEDIA = 64
MAX_SAMPLES = 16  # of one question
MAX_ANSWERS = 64  # of one job: its questions, each as often as it is to be answered
MAX_LOGPROBS = 131072  # of one job, ten megabytes of its result
MAX_METADATA_BYTES = 16 * 1024
MAX_INLINE_BYTES = 2**20  # of one `data:` URI, decoded
MAX_INLINE_URI_CHARS = 12 * 2**20  # of all `data:` URIs of a job together: 9 MiB as base64
MAX_URI_BYTES = 4096  # of any other URI: Linux' PATH_MAX, and more than S3 lets a key have
# Of all that is to be read or matched as text, as UTF-8: eight bytes for each token of the longest context there is.
MAX_TEXT_BYTES = 2**20
# Logits divided by much less go beyond what float32 holds, and what is drawn is the best already.
LEAST_TEMPERATURE = 1e-6
DEFAULT_MAX_ATTEMPTS = 3  # of a job that does not say how many it may have
MAX_SEEDS = 2**63
SCHEMES = ("s3", "file", "data", "https")
_TO_SEND = 'To send a file itself, give the client {"type": ..., "uri": Path(...)}'


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
    closed and the answer begun. 0 is an empty block. Nothing ends an answer before it has `min_tokens`, but a
    `response_schema` that it fulfils. `n` answers are drawn, each with a seed of its own. `logprobs` has the result
    tell how probable the model thought each token that was written.
    """

    stands_in = 'generation, as in {"generation": {"max_new_tokens": 256}}'

    max_new_tokens: Annotated[int, Field(ge=1, le=131072)] = 1024
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = None
    stop: Annotated[tuple[SomeText, ...], Field(max_length=8)] = ()
    seed: Annotated[int, Field(ge=0, lt=MAX_SEEDS)] | None = None
    max_thinking_tokens: Annotated[int, Field(ge=0, le=131072)] | None = added_in(2, None)
    min_tokens: Annotated[int, Field(ge=0, le=131072)] = added_in(2, 0)
    n: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] = added_in(2, 1)
    logprobs: bool = added_in(2, default=False)

    @model_validator(mode="after")
    def _asks_what_can_be(self) -> Self:
        if self.min_tokens > self.max_new_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} is above max_new_tokens {self.max_new_tokens}")
        if self.n > 1 and self.temperature is not None and self.temperature < LEAST_TEMPERATURE:
            raise ValueError(f"n {self.n} of a greedy answer are all the same: raise temperature, or leave n out")
        return self


class Question(Asked):
    """One of several about the same media; what it leaves out, single options too, is as the job says."""

    stands_in = 'a question, as in {"questions": [{"prompt": "What is it?"}]}'

    prompt: SomeText
    thinking: Thinking | None = None
    generation: GenerationOptions | None = None
    response_schema: ResponseSchema | None = None

    @field_serializer("generation")
    def _own(self, options: GenerationOptions | None) -> dict[str, Any] | None:
        # A default that was said stays said: the job may have another.
        return {name: getattr(options, name) for name in sorted(options.model_fields_set)} if options else None

    def completed(self, general: GenerationOptions) -> Self:
        """With the job's options beside its own. Raises `ValueError` where they cannot be together."""
        if self.generation is None:
            return self
        options = general.model_copy(update=self._own(self.generation))
        options._asks_what_can_be()  # type: ignore[operator]
        return self.model_copy(update={"generation": options})


class _OrText:
    """A question may be given as its text. Not in JSON, which is then read as strictly as all of a job."""

    @staticmethod
    def __get_pydantic_core_schema__(source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        question = handler(source)
        or_text = core_schema.no_info_before_validator_function(
            lambda given: {"prompt": given} if isinstance(given, str) else given, question
        )
        return core_schema.json_or_python_schema(question, or_text)


class AnalysisJob(Asked):
    """What is asked about some media: either `media` and a `prompt`, or full chat `messages` that hold their media.

    Of `questions` about the same `media`, in place of `prompt`, each is answered by itself, and they share what they
    have in common. Beside `messages`, each is a further part of the last one.
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
    response_schema: ResponseSchema | None = added_in(2, None)
    questions: Annotated[tuple[Annotated[Question, _OrText], ...], Field(max_length=MAX_ANSWERS)] = added_in(2, ())

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

    @field_validator("questions")
    @classmethod
    def _are_completed(cls, questions: tuple[Question, ...], info: ValidationInfo) -> tuple[Question, ...]:
        general = info.data.get("generation")
        return tuple(question.completed(general) for question in questions) if general else questions

    @model_validator(mode="after")
    def _asks_one_thing(self) -> Self:
        if (self.prompt is None) == (self.messages is None and not self.questions):
            raise ValueError("give either prompt or questions (with media) or messages, not both and not neither")
        if self.messages is not None:
            if self.media:
                raise ValueError("with messages, put the media into the messages' content")
            if self.messages[-1].role != "user":
                raise ValueError(f"the last message must be the user's, it is the {self.messages[-1].role}'s")
            if len(self.all_media()) > MAX_MEDIA:
                raise ValueError(f"{len(self.all_media())} media in the messages, the limit is {MAX_MEDIA}")
        if any(each.response_schema is not None and each.generation.stop for each in self.by_question()):
            raise ValueError("stop would cut an answer that has to fit a response_schema: give one of them")
        asked = [each.generation for each in self.by_question()]
        if (num_answers := sum(options.n for options in asked)) > MAX_ANSWERS:
            raise ValueError(f"{num_answers} answers (questions x n), a job may have {MAX_ANSWERS}: send several jobs")
        if (num := sum(each.n * each.max_new_tokens for each in asked if each.logprobs)) > MAX_LOGPROBS:
            raise ValueError(f"logprobs of {num} tokens (max_new_tokens x n), the limit is {MAX_LOGPROBS}: lower them")
        return self

    @model_validator(mode="after")
    def _is_of_a_size(self) -> Self:
        asked: tuple[AnalysisJob | Question, ...] = (self, *self.questions)
        texts = [part.text for part in self.all_parts() if isinstance(part, TextPart)]
        texts += [question.prompt for question in self.questions]
        texts += [stop for each in asked if each.generation for stop in each.generation.stop]
        size = sum(len(text.encode(errors="replace")) for text in texts)
        size += sum(len(to_json(each.response_schema)) for each in asked if each.response_schema is not None)
        if size > MAX_TEXT_BYTES:
            raise ValueError(
                f"prompt, messages, questions, schemas and stop are {size} bytes of text, the limit is {MAX_TEXT_BYTES}"
            )
        inline = sum(len(part.uri) for part in self.all_media() if part.uri[:5].lower() == "data:")
        if inline > MAX_INLINE_URI_CHARS:
            raise ValueError(f"{inline} characters of data: URIs, a job may have {MAX_INLINE_URI_CHARS}: upload them")
        return self

    def by_question(self) -> "tuple[AnalysisJob, ...]":
        """The job once for each of its questions, as if that were all it asks."""
        return tuple(map(self._of_one, self.questions)) or (self,)

    def _of_one(self, question: Question) -> "AnalysisJob":
        own = {name: value for name, value in question if name != "prompt" and value is not None}
        if self.messages is None:
            return self.model_copy(update={**own, "questions": (), "prompt": question.prompt})
        *before, last = self.messages
        parts = (TextPart(text=last.content),) if isinstance(last.content, str) else last.content
        last = last.model_copy(update={"content": (*parts, TextPart(text=question.prompt))})
        return self.model_copy(update={**own, "questions": (), "messages": (*before, last)})

    def conversation(self) -> tuple[ChatMessage, ...]:
        """The job as chat messages; a plain prompt is one user turn with its media before the text.

        Without `questions`: `by_question` has conversations that end with one.
        """
        return self.messages or (ChatMessage(role="user", content=self.all_parts()),)

    def all_parts(self) -> tuple[TextPart | ImagePart | VideoPart, ...]:
        """All that the model is shown, in prompt order, but the `questions`."""
        if self.messages is None:
            return self.media if self.prompt is None else (*self.media, TextPart(text=self.prompt))
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
