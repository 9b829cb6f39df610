"""What an answer has to fit: a JSON Schema, a regular expression or a list of choices. Checked before it is sent.

Each becomes a grammar of llguidance's; what that cannot enforce, or not within reasonable time, is refused. How long it
takes is bounded by sizes first, which are counted here.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from fractions import Fraction
from functools import lru_cache
from math import lcm, prod
from typing import Annotated, Any, Literal, get_args, get_origin
from urllib.parse import unquote

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue, TypeAdapter
from pydantic.errors import PydanticUserError

from keye.config.closing import Hint, Letters, shortest_closing
from keye.config.regex import written_out
from keye.config.text import SomeText, is_whole

# An answer nests as deeply at most: what reads it, pydantic as others', gives up at a few hundred levels.
MAX_DEPTH = 32
MAX_SCHEMA_BYTES = 64 * 2**10
MAX_CHOICES = 1000
MAX_REGEX_CHARS = 4096
# The most tokens a job may ask for: no answer is longer, and what counts on is a mistake or worse.
MAX_COUNT = 131072
# What a schema comes to, where its parts are multiplied by each other; a unit takes about 3 microseconds to compile.
_MAX_WEIGHT = 8000
_OF_A_SCHEMA, _OF_A_FORMAT, _OF_A_PATTERN = 15, 120, 30
_MOST_ASKED = 500
# By repetition, of the shortest text that a regular expression fits: each may stand in several places at a time.
_MOST_REPEATED = 200
_MOST_BYTES = 8192
# Of a text that is bounded: its letters are counted in states of a lexer, of which there are about ten for each.
_MOST_LETTERS = 20_000
# Characters of a regular expression with all its repetitions written out.
_MAX_EXPANDED = 20_000

Choices = Annotated[tuple[SomeText, ...], Field(min_length=1)]
# To check with, whatever the model: a token is a byte, the last one ends the text.
_BYTES = [bytes([byte]) for byte in range(256)]
_LETTERS = Letters(_BYTES)


def grammar_limits() -> Any:
    """What llguidance may spend on one answer, of time and of memory; a few milliseconds at a time."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=200_000,
        step_lexer_fuel=100_000,
        step_max_items=20_000,
        max_lexer_states=250_000,
        max_grammar_size=30_000,
        precompute_large_lexemes=False,
        verbose_errors=False,
    )


def answer_rule(schema: "ResponseSchema", *, is_tagged: bool = False) -> str:
    """Lines of llguidance's grammar (Lark) that define `answer`; where `is_tagged`, `</answer>` may close it."""
    closing = ' "</answer>"?' if is_tagged else ""
    match schema:
        case dict():
            return f"answer: %json {json.dumps({**schema, 'x-guidance': _AS_JSON})}{closing}\n"
        case str():
            from llguidance import regex_to_lark

            regex = f"/{regex_to_lark(schema, 'd')}/"
            if not is_tagged:
                return f"answer: REGEX\nREGEX: {regex}\n"
            # Where a text may hold anything, the first tag closes it.
            closed = 'answer: REGEX | closed\nclosed[lazy]: REGEX "</answer>"\n'
            return f"{closed}REGEX: {regex} & ~/(?s:.*)<\\/answer>/\n"
    return f"answer: ({' | '.join(json.dumps(choice) for choice in schema)}){closing}\n"


# At each place as little white space as JSON is written with by hand, or a model would write it without end. Without
# \u, that can say half a character.
_AS_JSON = {"whitespace_pattern": r" |\n {0,24}", "json_allowed_escapes": 'nrbtf\\"'}


def _as_written(given: Any) -> Any:
    """What Python has instead: a compiled pattern, an enum, a Literal, a model or any other type of pydantic's."""
    if isinstance(given, re.Pattern):
        flags = re.RegexFlag(given.flags) & ~re.UNICODE
        letters = "".join(letter for letter, flag in _FLAGS.items() if flag & flags)
        if not isinstance(given.pattern, str) or flags & ~sum(_FLAGS.values()):
            raise ValueError("is a pattern of bytes, or with flags that are not enforced: use I, M and S alone")
        return f"(?{letters}){given.pattern}" if letters else given.pattern
    choices = [member.value for member in given] if isinstance(given, type) and issubclass(given, Enum) else ()
    choices = get_args(given) if get_origin(given) is Literal else choices
    if choices and all(isinstance(choice, str) for choice in choices):
        return choices
    if isinstance(given, type | TypeAdapter) or get_origin(given) is not None:
        try:
            given = (given if isinstance(given, TypeAdapter) else TypeAdapter(given)).json_schema()
        except PydanticUserError:
            raise ValueError("is a type that has no JSON Schema") from None
    if not isinstance(given, dict | str | list | tuple):
        raise ValueError("is neither a JSON Schema (an object), a regular expression (text) nor a list of choices")
    if isinstance(given, list | tuple):
        if not 1 <= len(given) <= MAX_CHOICES:
            raise ValueError(f"is a list of {len(given)} choices, it may have 1 to {MAX_CHOICES}")
        if not all(isinstance(choice, str) and choice for choice in given):
            raise ValueError("is a list of choices that are not all of them text, or one is empty")
        return tuple(map(is_whole, given))
    if given == "":
        raise ValueError("is an empty regular expression: leave it out, or ask for .*")
    return _plain(given) if isinstance(given, dict) else is_whole(given)


_FLAGS = {"i": re.IGNORECASE, "m": re.MULTILINE, "s": re.DOTALL}


def _plain(schema: dict[str, Any]) -> Any:
    """As JSON has it."""
    # Bounded before it is written: each item is a byte at least, and what nests itself has no end.
    size, levels, inner = 0, 0, [schema]
    while inner := [each for each in inner if isinstance(each, dict | list | tuple | str)]:
        levels += any(not isinstance(each, str) for each in inner)
        size += sum(map(len, inner))
        if levels > 4 * MAX_DEPTH:
            raise ValueError(f"is nested more than {4 * MAX_DEPTH} levels deep, or nests itself")
        if size > MAX_SCHEMA_BYTES:
            raise ValueError(_LARGE)
        groups = [each for each in inner if not isinstance(each, str)]
        inner = [part for each in groups for part in ((*each, *each.values()) if isinstance(each, dict) else each)]
    try:
        text = json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise ValueError("is no JSON: it holds NaN, an infinity or another object of Python's") from None
    if len(text) > MAX_SCHEMA_BYTES:
        raise ValueError(_LARGE)
    return json.loads(text)


_LARGE = f"is more than {MAX_SCHEMA_BYTES} bytes of JSON"


def levels_of(value: Any) -> int:
    """How deeply lists and objects of JSON are nested."""
    levels, inner = 0, [value]
    while inner := [each for each in inner if isinstance(each, dict | list)]:
        levels += 1
        inner = [v for each in inner for v in (each.values() if isinstance(each, dict) else each)]
    return levels


def _can_be_enforced(schema: Any) -> Any:
    fault = _fault_of(json.dumps(schema))
    if fault:
        raise ValueError(fault)
    return schema


@lru_cache(maxsize=256)
def _fault_of(text: str) -> str | None:
    """Why it is refused. Cached: a job is checked wherever it is copied, sealed and opened."""
    from llguidance import LLMatcher

    schema = json.loads(text)
    try:
        match schema:
            case dict():
                if "x-guidance" in schema:
                    return "x-guidance is not the caller's to set: leave it out"
                if (weight := _Weighing(schema).weigh(schema)) > _MAX_WEIGHT:
                    return f"is too complex (at {weight}, the limit is {_MAX_WEIGHT}): {_SIMPLER}"
            case str():
                _measure(schema)
            case list():
                if sum(map(len, schema)) > MAX_SCHEMA_BYTES:
                    return f"is {sum(map(len, schema))} characters of choices, the limit is {MAX_SCHEMA_BYTES}"
                if any(choice.endswith("</answer>") for choice in schema):
                    return "has a choice that ends with </answer>, which is what closes an answer"
    except ValueError as error:
        return str(error)
    matcher = LLMatcher(_bytes(), "start: answer\n" + answer_rule(schema), log_level=0, limits=grammar_limits())
    if not matcher.is_error() and matcher.is_accepting() and not any(matcher.compute_bitmask()[: len(_BYTES) // 8]):
        return "fits no text but an empty one"
    is_endless = shortest_closing(matcher, _LETTERS, Hint(schema), _MOST_BYTES) is None
    if is_endless and not matcher.is_error():
        return "has no short answer: it repeats itself without end, or asks for very many items or characters"
    return _in_words(matcher.get_error()) if matcher.is_error() else None


_SIMPLER = "use fewer properties, enum values and formats, and fewer alternatives that are combined with each other"


@lru_cache(maxsize=1)
def _bytes() -> Any:
    from llguidance import LLTokenizer, TokenizerWrapper

    return LLTokenizer(TokenizerWrapper(Tokens([*_BYTES, b"<end>"], [256], 256, lambda text: list(text.encode()))))


@dataclass(frozen=True)
class Tokens:
    """A vocabulary as llguidance reads it; `encode` never gives a special token."""

    tokens: Sequence[bytes]
    special_token_ids: Sequence[int]
    eos_token_id: int
    encode: Callable[[str], list[int]]
    bos_token_id: int | None = None

    def __call__(self, text: str) -> list[int]:
        return self.encode(text)


def _in_words(error: str) -> str:
    """llguidance's own, without its quotations: they may be long, and of a caller's secrets."""
    sentence = error.split("\n")[0].removeprefix("failed to compile JSON schema: ")
    sentence = re.sub(
        r"^at \d+\(\d+\): (failed to compile JSON schema: |invalid regex .* \(in regex\): )?", "", sentence
    )
    if of_a_regex := re.search("^error: (.*)", error, re.MULTILINE):
        sentence = f"in a regular expression, {of_a_regex[1]}"
    # It names options of its own, which callers have none of.
    return f"cannot be enforced: {re.split(' Enable | in regex /', sentence)[0][:200]}"


class _Weighing:
    """How much a JSON Schema comes to: what it holds is added up, what has to hold together is multiplied."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._weighed: dict[tuple[str, bool], int] = {}
        self._states = 1

    def weigh(self, schema: Any, depth: int = 0, is_combined: bool = False) -> int:
        """`is_combined` where something else has to hold with it: each value of an enum is then an alternative.

        Raises `ValueError` for a number that is out of bounds, or what is nested too deeply.
        """
        if depth > MAX_DEPTH:
            raise ValueError(f"is nested more than {MAX_DEPTH} levels deep")
        if not isinstance(schema, dict):
            return 1
        is_combined = is_combined or "allOf" in schema or len(schema.keys() & _COMBINED) > 1

        def sum_of(schemas: Iterable[Any]) -> int:
            return sum(self.weigh(each, depth + 1, is_combined) for each in schemas)

        weight = _OF_A_FORMAT * ("format" in schema) + self._values(schema)
        weight += _OF_A_SCHEMA * len(_listed(schema, "enum")) * is_combined
        if isinstance(properties := schema.get("properties"), dict):
            weight += sum_of(properties.values())
        if isinstance(patterns := schema.get("patternProperties"), dict):
            # Each is compared with every other.
            weight += len(patterns) * sum_of(patterns.values())
        weight += sum_of(schema.get(name) for name in ("items", "additionalItems", "additionalProperties"))
        weight += sum_of([*_listed(schema, "items"), *_listed(schema, "prefixItems")])
        together = [sum_of([each]) for each in _listed(schema, "allOf")]
        together.append(sum_of(_listed(schema, "anyOf")))
        together.append(len(_listed(schema, "oneOf")) * sum_of(_listed(schema, "oneOf")))
        together.append(weight - 2)
        if isinstance(ref := schema.get("$ref"), str):
            # Alone it is compiled once, however often it is referred to.
            is_compiled = not is_combined and (ref, False) in self._weighed
            together.append(0 if is_compiled else self._refer(ref, depth, is_combined))
        together = [each for each in together if each > 0]
        if len(together) > 1:
            together = [_OF_A_SCHEMA * prod(1 + each // _OF_A_SCHEMA for each in together)]
        return min(_OF_A_SCHEMA + sum(together), 10**9)

    def _refer(self, ref: str, depth: int, is_combined: bool) -> int:
        if (key := (ref, is_combined)) not in self._weighed:
            self._weighed[key] = 1  # While it is weighed, and where it refers to itself.
            self._weighed[key] = self.weigh(self._part(ref), depth + 1, is_combined)
        return self._weighed[key]

    def _part(self, ref: str) -> Any:
        """What a `$ref` means. Another reading of it than llguidance's would leave uncounted what is behind it."""
        start, *steps = unquote(ref).split("/")
        if start not in ("", "#"):
            raise ValueError(f"$ref {ref[:80]!r} cannot be enforced: use one within the schema, such as #/$defs/name")
        part = self._root
        try:
            for step in steps:
                step = step.replace("~1", "/").replace("~0", "~")
                part = part[int(step) if isinstance(part, list) else step]
        except (LookupError, TypeError, ValueError):
            raise ValueError(f"$ref {ref[:80]!r} points to what does not exist") from None
        return part

    def _values(self, schema: Mapping[str, Any]) -> int:
        listed = [schema.get("const"), *_listed(schema, "enum")]
        values = json.dumps(listed)
        if re.search(r"(?<!\\)(\\\\)*\\u00[01]", values):
            raise ValueError("const and enum cannot hold control characters but \\n, \\r, \\t, \\b and \\f")
        weight = len(listed) + len(values) // 6 + len(_listed(schema, "required"))
        # Each value within another is compiled as a schema is.
        inner = json.dumps([each for each in listed if isinstance(each, dict | list)])[1:]
        weight += _OF_A_SCHEMA * sum(map(inner.count, "[{,"))
        # So is a property that has none.
        known = properties if isinstance(properties := schema.get("properties"), dict) else {}
        weight += _OF_A_SCHEMA * sum(str(name) not in known for name in _listed(schema, "required"))
        bounds = {name: bound for name in _BOUNDS if isinstance(bound := schema.get(name), int | float)}
        for name, bound in bounds.items():
            if abs(bound) > _LARGEST:
                raise ValueError(f"{name} is beyond {_LARGEST}, where numbers are no longer exact")
            # llguidance takes 0 for more than 0 where it has to be less than 0.5 too.
            if name.startswith("ex") and bound == int(bound) and any(0 < abs(o - bound) < 1 for o in bounds.values()):
                raise ValueError(f"{name} {bound:g} cannot be enforced that near another bound: include it")
        for name in _COUNTS:
            most = _MOST_ASKED if name.startswith("min") else _MOST_LETTERS if name == "maxLength" else MAX_COUNT
            if isinstance(count := schema.get(name), int | float) and count > most:
                raise ValueError(f"{name} {count:g} is above {most}")
        least, required = schema.get("minProperties"), len(_listed(schema, "required"))
        if isinstance(least, int | float) and least > max(required, 1):
            raise ValueError("minProperties cannot be enforced: names that are not required may repeat")
        if isinstance(step := schema.get("multipleOf"), int | float) and step > 0:
            # Those that may stand in one place are counted side by side, in as many states as all have together.
            self._states = lcm(self._states, Fraction(repr(step)).numerator)
            weight += self._states
        for pattern in (schema.get("pattern"), *schema.get("patternProperties", ())):
            if isinstance(pattern, str):
                weight += _OF_A_PATTERN + _measure(pattern) // 20
        return weight


_COMBINED = {"allOf", "anyOf", "oneOf", "$ref", "enum", "properties"}
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_LARGEST = 2**53
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")


def _listed(schema: Mapping[str, Any], name: str) -> list[Any]:
    return inner if isinstance(inner := schema.get(name), list) else []


def _measure(regex: str) -> int:
    """Characters of a regular expression with its repetitions written out. Raises `ValueError` where they are many."""
    if len(regex) > MAX_REGEX_CHARS:
        raise ValueError(f"is a regular expression of {len(regex)} characters, the limit is {MAX_REGEX_CHARS}")
    size, sample = written_out(regex)
    if size > _MAX_EXPANDED:
        raise ValueError(f"is a regular expression that repeats {size} characters, the limit is {_MAX_EXPANDED}")
    if len(sample) > max(len(regex), _MOST_ASKED):
        raise ValueError(
            f"is a regular expression that asks for {len(sample)} characters, repeat {_MOST_ASKED} at most"
        )
    return size


ResponseSchema = Annotated[
    dict[str, JsonValue] | Choices | SomeText, BeforeValidator(_as_written), AfterValidator(_can_be_enforced)
]
"""An object is a JSON Schema, a list the texts of which one is the answer, a text a regular expression."""
