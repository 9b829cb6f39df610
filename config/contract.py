"""How strict every model that crosses the queue is, how each may grow while releases run side by side, and in what
words its faults are told.
"""

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from inspect import get_annotations
from typing import Any, ClassVar, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from keye.config.familiar_names import OF_A_JOB
from keye.config.faults import InvalidJob

# More of them, or longer names of unknown fields, nobody reads.
MAX_FAULTS, MAX_PLACE_CHARS = 100, 200

Value = TypeVar("Value")


class Contract(BaseModel):
    """What a caller asks: immutable, and refuses fields it does not know. A misspelt option must never be ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    stands_in: ClassVar[str] = ""
    """Of a part of a job: where a caller writes its fields, for whoever wrote one elsewhere."""


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


class Report(Contract):
    """What a worker says: whoever reads it passes over fields he does not know. A newer worker may say more."""

    model_config = ConfigDict(extra="ignore")


def added_in(version: int, default: Value) -> Value:
    """The default of a job's field that came with this schema version.

    A job that leaves the field at it is sealed without the field, so that workers that do not know it read the job.
    """
    return Field(default=default, exclude_if=lambda value: value == default, json_schema_extra={"added_in": version})


def version_needed(value: Any) -> int:
    """The lowest schema version that knows everything that `value`, a job or a part of one, uses.

    A value that came later than its field (a kind of part, a word of an enum) says so by an attribute `added_in`.
    """
    versions = [getattr(value, "added_in", 1)]
    match value:
        case Contract():
            fields = type(value).model_fields
            for name, inner in value:
                if inner != fields[name].default:
                    versions += [version_of(fields[name]), version_needed(inner)]
        case list() | tuple() | frozenset():
            versions += map(version_needed, value)
    return max(versions)


def version_of(field: FieldInfo) -> int:
    """The schema version that a job's field came with."""
    return cast(dict[str, int], field.json_schema_extra or {}).get("added_in", 1)


def describe_faults(error: ValidationError) -> str:
    """One line a fault: where, and what is wrong. Values are left out: they may hold secrets such as signed URLs."""
    number = error.error_count()
    return f"{number} faults" if number > MAX_FAULTS else list_faults(faults_of(error))


def list_faults(faults: Sequence[str]) -> str:
    return f"{len(faults)} fault{'s' if len(faults) > 1 else ''}: " + "; ".join(faults)


def faults_of(error: ValidationError) -> list[str]:
    """As `place: sentence`, without pydantic's insides: its names of functions, branches of unions and Python types."""
    found = error.errors(include_url=False)
    no_lists = {fault["loc"][:-1] for fault in found if fault["type"] == "tuple_type"}
    # A list whose items are wrong is empty to pydantic.
    beneath = {fault["loc"][:depth] for fault in found for depth in range(1, len(fault["loc"]))}
    faults = []
    for fault in found:
        place, kind = fault["loc"], fault["type"]
        sentence = _sentence(fault)
        if kind == "extra_forbidden":
            sentence += _what_instead(str(place[-1]), _is_in_a_part(error.title, place))
        if place and _is_branch(place[-1]) and kind in ("string_type", "tuple_type"):
            # Of `str | tuple[...]`, what was given is one or neither.
            if kind == "tuple_type" or place[:-1] not in no_lists:
                continue
            sentence = f"Input should be text or a list of parts such as {A_PART}, not {name_kind(fault['input'])}"
        if kind != "too_short" or place not in beneath:
            faults.append(f"{_in_words(place) or 'job'}: {sentence}")
    return faults


def escaped(text: str) -> str:
    """For what strangers wrote: one line, in which no character moves the cursor, turns the text round or is hidden."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def name_kind(value: object) -> str:
    """What somebody gave, by its type alone."""
    kind = type(value)
    is_known = kind.__module__ == "builtins" or isinstance(value, Contract)
    name = kind.__qualname__ if is_known else f"{kind.__module__}.{kind.__qualname__}"
    return _KINDS.get(kind) or f"of type {escaped(name)[:MAX_PLACE_CHARS]}"


_KINDS = {str: "text", list: "a list", tuple: "a list", dict: "an object", type(None): "nothing (null)", bytes: "bytes"}
_KINDS |= {bool: "true or false", int: "a number", float: "a number"}

A_PART = '{"type": "image", "uri": "s3://bucket/key"}'
# Where pydantic's own sentences name its insides or Python's, quote what stands there, or hide the way out.
_SENTENCES = {
    "extra_forbidden": "is no field here",
    "invalid-json-value": "is no JSON: it is {kind}",
    "model_attributes_type": "Input should be a part such as {part}, not {kind}",
    "model_type": "Input should be an object, not {kind}",
    "string_unicode": "Input should be a valid string, it holds half a character (a lone surrogate)",
    "too_long": "has more than {max_length} items",
    "too_short": "has fewer than {min_length} items",
    "tuple_type": "Input should be a list, not {kind}",
    "union_tag_invalid": "type is none of {expected_tags}. A part is written {part}",
    "union_tag_not_found": "says no type. A part is written {part}",
}
# What the parts of other models' chats call it.
_URI_ELSEWHERE = ("image", "video", "image_url", "video_url", "url", "path", "file")


def _sentence(fault: ErrorDetails) -> str:
    kind, given = fault["type"], name_kind(fault["input"])
    if kind == "string_unicode" and given != "text":
        return f"Input should be a valid string, not {given}"
    if kind not in _SENTENCES:
        return fault["msg"].removeprefix("Value error, ") + f", not {given}" * kind.endswith("_type")
    return _SENTENCES[kind].format(**fault.get("ctx", {}), kind=given, part=A_PART)


def _what_instead(name: str, is_in_a_part: bool) -> str:
    """Of a name that is no field where it stands."""
    if is_in_a_part and name in _URI_ELSEWHERE:
        return ": did you mean uri?"
    if name in OF_A_JOB:
        return f": {OF_A_JOB[name]}"
    models = list(_models_of(Contract))
    if homes := {model.stands_in: None for model in models if name in get_annotations(model) and model.stands_in}:
        return f": it stands in {' or '.join(homes)}"
    near = get_close_matches(name, {field for model in models for field in model.model_fields}, 1)
    return f": did you mean {near[0]}?" if near else ""


def _models_of(model: type[Contract]) -> Iterator[type[Contract]]:
    """Of all that a caller may ask."""
    yield model
    for kind in model.__subclasses__():
        if kind is not Report:
            yield from _models_of(kind)


def _is_in_a_part(title: str, place: Sequence[int | str]) -> bool:
    """Whether it was given to a medium: by itself (`title` names what was made), or behind its number and type."""
    return (len(place) == 1 and title in ("ImagePart", "VideoPart")) or place[-2:-1] in (("image",), ("video",))


def _is_branch(place: int | str) -> bool:
    # So pydantic calls the branches of `str | tuple[...]`.
    return place == "str" or str(place).startswith(("tuple[", "function-"))


def _in_words(place: Sequence[int | str]) -> str:
    if "metadata" in place:
        # Beneath it pydantic names the types of values too.
        place = place[: place.index("metadata") + 2]
    return escaped(".".join(str(each) for each in place if not _is_branch(each)))[:MAX_PLACE_CHARS]
