"""What may be asked of an answer's form: how Python says it, what cannot be enforced, and what would cost too much."""

import enum
import json
import re
from collections.abc import Callable
from typing import Any, Literal

import pytest
from pydantic import BaseModel, TypeAdapter

from keye.config import response_schema
from keye.config.faults import InvalidJob
from keye.config.job import AnalysisJob
from keye.config.regex import written_out


class Box(BaseModel):
    label: str
    corners: tuple[int, int, int, int]
    inner: "Box | None" = None


class Colour(enum.Enum):
    RED = "红"
    BLUE = "blue"


def ask(schema: Any, **options: Any) -> AnalysisJob:
    return AnalysisJob(prompt="what?", response_schema=schema, **options)


@pytest.mark.holds(
    "docs/answers.md#answers-that-fit",
    "`response_schema` is a pydantic model or a JSON Schema, a list of choices, or a regular expression",
)
@pytest.mark.parametrize(
    ("given", "sealed"),
    [
        ({"type": "integer"}, {"type": "integer"}),
        (r"\d{4}", r"\d{4}"),
        (["yes", "no"], ["yes", "no"]),
        (("是", "😀"), ["是", "😀"]),
        (re.compile("ab+"), "ab+"),
        (re.compile("a.b", re.IGNORECASE | re.DOTALL), "(?is)a.b"),
        (Colour, ["红", "blue"]),
        (Literal["yes", "no"], ["yes", "no"]),
        (Literal[1, 2], {"enum": [1, 2], "type": "integer"}),
        (list[int], {"items": {"type": "integer"}, "type": "array"}),
        (TypeAdapter(dict[str, bool]), {"additionalProperties": {"type": "boolean"}, "type": "object"}),
    ],
)
def test_a_schema_is_said_as_python_says_it_and_sent_as_json(given: Any, sealed: Any) -> None:
    job = ask(given)
    assert json.loads(job.model_dump_json())["response_schema"] == sealed
    assert AnalysisJob.model_validate_json(job.model_dump_json()) == job


def test_a_pydantic_model_is_its_json_schema() -> None:
    assert ask(Box).response_schema == Box.model_json_schema()


SUPPORTED: dict[str, Any] = {
    "nested": {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/b"}, "$defs": {"b": {"type": "boolean"}}},
    "recursion that may end": {"type": "object", "properties": {"next": {"$ref": "#"}}},
    "ends by its second way": {
        "anyOf": [
            {"type": "object", "properties": {"c": {"$ref": "#"}}, "required": ["c"]},
            {"type": "object", "properties": {"leaf": {"type": "integer"}}, "required": ["leaf"]},
        ]
    },
    "a hundred properties": {
        "properties": {f"property_{n}": {"type": "string"} for n in range(100)},
        "required": [f"property_{n}" for n in range(100)],
        "type": "object",
    },
    "a thousand values": {"enum": [f"value {n}" for n in range(1000)]},
    "formats": {"properties": {f: {"type": "string", "format": f} for f in ("date", "date-time", "email", "uuid")}},
    "numbers": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    "multiples": {"type": "integer", "multipleOf": 7, "minimum": 1},
    "large multiples": {"properties": {"a": {"type": "integer", "multipleOf": 500, "minimum": 1}}, "required": ["a"]},
    "long text": {"type": "string", "minLength": 100, "maxLength": 10_000},
    "anything": {},
    "mail": r"[^@]+@[^@]+\.[a-z]{2,}",
    "somewhere": "^.*needle.*$",
    "text with a pattern": {"type": "string", "pattern": "[A-Z]{2}-[0-9]{4}"},
    "Unicode": "是[\u4e00-\u9fff]{1,3}😀?",
    "formats that no letter alone ends": {
        "properties": {f: {"type": "string", "format": f} for f in ("email", "uri", "duration")},
        "required": ["email", "uri", "duration"],
    },
    "a reference with escapes": {"$ref": "#/$defs/a%20b~1c", "$defs": {"a b/c": {"type": "integer"}}},
    "a reference into a list": {"anyOf": [{"type": "integer"}, {"$ref": "#/anyOf/0"}]},
    "classes in a class": "[a-z&&[^aeiou]]+|[[:alpha:]]",
}


@pytest.mark.parametrize("name", SUPPORTED)
def test_what_can_be_enforced_is_taken(name: str) -> None:
    ask(SUPPORTED[name])


def nested(levels: int) -> Any:
    return {"type": "array", "items": nested(levels - 1)} if levels else {"type": "integer"}


def referred(times: int, *, by: str = "allOf") -> Any:
    definitions: dict[str, Any] = {f"d{n}": {by: [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(times)}
    definitions[f"d{times}"] = {"type": "object", "properties": {"x": {"type": "string"}}}
    return {"$ref": "#/$defs/d0", "$defs": definitions}


def combined(groups: int, ways: int, *, by: str = "anyOf") -> Any:
    def way(group: int, value: int) -> Any:
        return {"type": "object", "properties": {f"p{group}": {"const": value}}, "required": [f"p{group}"]}

    return {"allOf": [{by: [way(group, value) for value in range(ways)]} for group in range(groups)]}


def itself() -> Any:
    schema: dict[str, Any] = {"type": "object"}
    schema["properties"] = {"inner": schema}
    return schema


def in_objects(levels: int) -> Any:
    schema: dict[str, Any] = {}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def many_of_the_same() -> Any:
    values: list[Any] = ["a"]
    for _ in range(40):
        values = [values, values]
    return {"enum": values}


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a set": (lambda: {"a"}, "neither a JSON Schema"),
    "a number": (lambda: 5, "neither a JSON Schema"),
    "a class that is no type of pydantic's": (lambda: re.Match, "no JSON Schema"),
    "a pattern of bytes": (lambda: re.compile(b"a"), "pattern of bytes"),
    "not a number": (lambda: {"const": float("nan")}, "is no JSON"),
    "another object in it": (lambda: {"const": b"a"}, "is no JSON"),
    "itself": (itself, "nests itself"),
    "many of the same": (lambda: many_of_the_same(), "65536 bytes"),
    "half a character": (lambda: {"const": "\ud800"}, "cannot be enforced"),
    "half a character alone": (lambda: "\ud800", "half a character"),
    "a choice that is half a character": (lambda: ["\ud800"], "half a character"),
    "a control character": (lambda: {"enum": ["\x01"]}, "control characters"),
    "an unknown keyword": (lambda: {"type": "array", "uniqueItems": True}, "uniqueItems"),
    "not": (lambda: {"not": {}}, "not"),
    "alternatives that overlap": (
        lambda: {"oneOf": [{"type": "integer"}, {"type": "number"}]},
        "oneOf constraints are not supported",
    ),
    "a remote reference": (lambda: {"$ref": "https://example.com/x.json"}, "use one within the schema"),
    "a reference to nothing": (lambda: {"$ref": "#/$defs/no"}, "does not exist"),
    "a reference to an anchor": (lambda: {"$ref": "#a", "$defs": {"b": {"$anchor": "a"}}}, "use one within"),
    "options of the grammar's": (lambda: {"type": "string", "x-guidance": {"lenient": True}}, "x-guidance"),
    "names that may repeat": (lambda: {"type": "object", "minProperties": 2}, "minProperties"),
    "minimum above maximum": (lambda: {"type": "integer", "minimum": 5, "maximum": 1}, "minimum (5)"),
    "a bound beyond what is exact": (lambda: {"type": "integer", "minimum": 2**63}, "no longer exact"),
    "an excluded bound near another": (lambda: {"exclusiveMinimum": 0, "maximum": 0.5}, "include it"),
    "a property that cannot be": (
        lambda: {"type": "object", "properties": {"a": False}, "required": ["a"]},
        "unsatisfiable",
    ),
    "an empty enum": (lambda: {"enum": []}, "Unsatisfiable"),
    "no end": (lambda: {"type": "object", "properties": {"c": {"$ref": "#"}}, "required": ["c"]}, "no short answer"),
    "nothing but itself": (lambda: {"$ref": "#"}, "no short answer"),
    "items without end": (lambda: {"type": "array", "items": {"$ref": "#"}, "minItems": 1}, "no short answer"),
    "hundreds of hundreds": (
        lambda: {"type": "array", "minItems": 99, "items": {"type": "array", "items": {"const": 1}, "minItems": 99}},
        "no short answer",
    ),
    "a long text": (lambda: {"type": "string", "maxLength": 10**9}, "maxLength 1e+09 is above 20000"),
    "many items": (lambda: {"type": "array", "minItems": 10**6}, "minItems 1e+06 is above 500"),
    "deep": (lambda: nested(60), "nested more than 32"),
    "very deep": (lambda: nested(400), "nested more than 128"),
    "very deep in objects": (lambda: in_objects(900), "nested more than 128"),
    "large": (lambda: {"enum": [f"value {n}" for n in range(10_000)]}, "65536 bytes"),
    "very large": (lambda: {"enum": ["x" * 10**7]}, "65536 bytes"),
    "many properties": (lambda: {"properties": {f"p{n}": {"type": "string"} for n in range(1000)}}, "too complex"),
    "many required that are no properties": (lambda: {"required": [f"p{n}" for n in range(1000)]}, "too complex"),
    "many values within values": (lambda: {"enum": [{"a": [n] * 3} for n in range(1000)]}, "too complex"),
    "a product behind an escape": (
        lambda: {"$ref": "#/$defs/a%20b", "$defs": {"a b": combined(4, 8)}},
        "too complex",
    ),
    "a product behind a list": (
        lambda: {"anyOf": [True, {"$ref": "#/$defs/0"}], "$defs": [combined(4, 8)]},
        "too complex",
    ),
    "a product in old tuples": (lambda: {"type": "array", "items": [combined(4, 8)]}, "too complex"),
    "a bomb of references": (lambda: referred(14), "too complex"),
    "a bomb of exclusive ones": (lambda: referred(14, by="oneOf"), "too complex"),
    "a product": (lambda: combined(4, 8), "too complex"),
    "a product of exclusive ones": (lambda: combined(2, 20, by="oneOf"), "too complex"),
    "alternatives to compare": (
        lambda: {"oneOf": [{"properties": {"k": {"const": n}}, "required": ["k"]} for n in range(300)]},
        "too complex",
    ),
    "patterns to compare": (
        lambda: {"patternProperties": {f"^a{n}.*b": {"type": "string"} for n in range(50)}},
        "too complex",
    ),
    "patterns that hold together": (
        lambda: {"allOf": [{"type": "string", "pattern": f"^.*{c}.{{3}}$"} for c in "abcdefghijklmnop"]},
        "too complex",
    ),
    "a prime of multiples": (lambda: {"type": "integer", "multipleOf": 10**9 + 7}, "too complex"),
    "multiples side by side": (lambda: {"anyOf": [{"multipleOf": n} for n in (97, 89, 83, 79)]}, "too complex"),
    "no regular expression": (lambda: "(", "cannot be enforced"),
    "no text": (lambda: "", "empty regular expression"),
    "nothing but no text": (lambda: "^a{0}$", "no text but an empty one"),
    "a class without an end": (lambda: "([a-z", "[ that ends nowhere"),
    "an empty class": (lambda: "[]", "unclosed character class"),
    "a class without an end in a schema": (lambda: {"type": "string", "pattern": "[^"}, "[ that ends nowhere"),
    "an escape of nothing": (lambda: "a\\", "\\ that ends nowhere"),
    "white space that says nothing": (lambda: "(?x) a b", "verbose"),
    "a look ahead": (lambda: "(?=a)b", "in a regular expression, look-around, including look-ahead"),
    "a border of words": (lambda: r"\bfoo", "lookarounds"),
    "what matches nothing": (lambda: r"[^\x00-\x{10FFFF}]", "no short answer"),
    "a long expression": (lambda: "a" * 5000, "5000 characters"),
    "repeated repetitions": (lambda: "(a{1,1000}){1,1000}", "repeats 1000000 characters"),
    "repeated with a space": (lambda: "a{ 100000000 }", "repeats 1000000 characters"),
    "repeated behind a class": (lambda: "([[a])]{1000}){1000}", "repeats 1000000 characters"),
    "many that may be left out": (lambda: "(a?){9000}a{9000}", "the limit is 20000"),
    "many that may be nothing": (lambda: "(a|){9000}a{9000}", "the limit is 20000"),
    "repeated thrice": (lambda: "((a{1,100}){1,100}){1,100}", "repeats 1000000 characters"),
    "repeated in a schema": (lambda: {"type": "string", "pattern": "(a{999}){999}"}, "repeats"),
    "no choice": (list, "list of 0 choices"),
    "an empty choice": (lambda: [""], "one is empty"),
    "a choice that would be cut": (lambda: ["a</answer>"], "closes an answer"),
    "choices that are no text": (lambda: ["a", 1], "not all of them text"),
    "many choices": (lambda: [f"c{n}" for n in range(10_000)], "list of 10000 choices"),
    "letters of all scripts, a thousand at least": (lambda: r"(?i)\w{1000}x", "asks for 1001 characters"),
    "anything, and a thousand more": (lambda: ".*a.{1000}", "asks for 1001 characters"),
    "words without number within": (lambda: {"type": "string", "pattern": r"(\w+ ){500}"}, "asks for 1000 characters"),
}


@pytest.mark.holds("docs/answers.md#answers-that-fit", "What cannot be enforced is an `InvalidJob` when it is sent")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_enforced_or_would_cost_much_is_refused_with_the_reason(name: str) -> None:
    schema, reason = REFUSED[name]
    with pytest.raises(InvalidJob, match=re.escape(reason)) as refused:
        ask(schema())
    assert str(refused.value).startswith("1 fault: response_schema")
    assert len(str(refused.value)) < 500


def test_what_is_counted_as_too_much_is_not_even_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(*_: Any) -> Any:
        raise AssertionError("it was compiled")

    monkeypatch.setattr(response_schema, "answer_rule", compiled)
    response_schema._fault_of.cache_clear()
    for schema, reason in REFUSED.values():
        if reason in ("too complex", "repeats 1000000 characters", "nested more than 32", "65536 bytes"):
            with pytest.raises(InvalidJob, match=reason):
                ask(schema())


@pytest.mark.holds("docs/answers.md#answers-that-fit", "`stop` does not go with a schema.")
def test_stop_would_cut_what_has_to_fit() -> None:
    with pytest.raises(InvalidJob, match="stop would cut"):
        ask(["yes", "no"], generation={"stop": ["."]})
    with pytest.raises(InvalidJob, match="stop would cut"):
        AnalysisJob(generation={"stop": ["."]}, questions=[{"prompt": "?", "response_schema": ["yes"]}])


@pytest.mark.parametrize(
    ("regex", "size", "sample"),
    [
        ("abc", 3, "abc"),
        (r"[^@]+@[^@]+\.[a-z]{2,}", 6, "a@a.aa"),
        (r"\d{4}-\d{2}(/[A-Z])?", 69, "0000-00"),
        ("(?:yes|no)!", 6, "no!"),
        ("(a{2,3}b){2}", 8, "aabaab"),
        (r"[\]x]\(\p{L}", 3, "](a"),
        ("(?i)^x$", 1, "x"),
        ("(?P<n>x*)y", 62, "y"),
        ("(a|){2}", 122, ""),
        (r"[[:alpha:]&&[^)]]{2}", 2, "[["),
        ("((", 0, ""),
    ],
)
def test_a_regular_expression_is_written_out(regex: str, size: int, sample: str) -> None:
    assert written_out(regex) == (size, sample)
