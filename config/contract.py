"""How strict every model that crosses the queue is, and how each may grow while releases run side by side.

Words of what workers report, to which later releases may add. The engine reads it, and knows no pydantic.
"""

from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

Value = TypeVar("Value")


class Contract(BaseModel):
    """What a caller asks: immutable, and refuses fields it does not know. A misspelt option must never be ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Report(Contract):
    """What a worker says: whoever reads it passes over fields he does not know. A newer worker may say more."""

    model_config = ConfigDict(extra="ignore")


def added_in(version: int, default: Value) -> Value:
    """The default of a job's field that came with this schema version.

    A job that leaves the field at it is sealed without the field, so that workers that do not know it read the job.
    """
    field: Any = Field(
        default=default, exclude_if=lambda value: value == default, json_schema_extra={"added_in": version}
    )
    return field  # type: ignore[no-any-return]


def version_needed(value: Any) -> int:
    """The lowest schema version that knows everything that `value`, a job or a part of one, uses.

    A value that came later than its field (a kind of part, a word of an enum) says so by an attribute `added_in`.
    """
    versions = [getattr(value, "added_in", 1)]
    match value:
        case Contract():
            fields = type(value).model_fields
            used = [(fields[name], inner) for name, inner in value if inner != fields[name].default]
            versions += [max(_added_in(field), version_needed(inner)) for field, inner in used]
        case list() | tuple() | frozenset():
            versions += map(version_needed, value)
    return max(versions)


def _added_in(field: FieldInfo) -> int:
    extra = field.json_schema_extra
    return int(str(extra["added_in"])) if isinstance(extra, dict) and "added_in" in extra else 1


if TYPE_CHECKING:
    from pydantic import GetJsonSchemaHandler
    from pydantic_core import CoreSchema


class OpenEnum(StrEnum):
    """A word that this release does not know is kept as it was said, and equals none that it does."""

    @classmethod
    def _missing_(cls, value: object) -> Any:
        if not isinstance(value, str):
            return None
        word = str.__new__(cls, value)
        word._name_ = word._value_ = value
        return word

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: "CoreSchema", handler: "GetJsonSchemaHandler") -> dict[str, Any]:
        schema = handler(core_schema)
        known = handler.resolve_ref_schema(schema)
        known["examples"] = known.pop("enum")
        return schema
