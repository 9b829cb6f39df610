"""Words of what workers report, to which later releases may add. The engine reads it, and knows no pydantic."""

from enum import StrEnum
from typing import TYPE_CHECKING, Any

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
