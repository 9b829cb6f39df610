"""Whether an answer fits its schema, by those who wrote no line of how it is enforced."""

import json
import re
from typing import Any

import jsonschema

from keye.config.response_schema import ResponseSchema

SCHEMAS: dict[str, Any] = {
    "object": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "name": {"type": "string"}, "b": {"type": "boolean"}},
        "required": ["a", "name"],
        "additionalProperties": False,
    },
    "nested": {
        "$ref": "#/$defs/n",
        "$defs": {
            "n": {
                "type": "object",
                "properties": {"v": {"type": "boolean"}, "kids": {"type": "array", "items": {"$ref": "#/$defs/n"}}},
                "required": ["v"],
            }
        },
    },
    "Chinese": {
        "type": "array",
        "items": {"type": "object", "properties": {"颜色": {"enum": ["红", "绿😀", None]}}, "required": ["颜色"]},
        "minItems": 1,
        "maxItems": 3,
    },
    "anything": {},
    "integer": {"type": "integer"},
    "text": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]+$"},
    "regex": r"[A-Z]{2}-\d{4}",
    "any text": r"(?s).*",
    "mail": r"[^@\n]+@[^@\n]+\.[a-z]{2,}",
    "choices": ["yes", "no", "yes, but", "是", "😀"],
}


def assert_fits(schema: ResponseSchema, answer: str) -> None:
    match schema:
        case dict():
            jsonschema.validate(json.loads(answer), schema)
        case str():
            assert re.fullmatch(schema, answer), (schema, answer)
        case _:
            assert answer in schema
