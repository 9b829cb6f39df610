"""How an answer that has a grammar is brought to its end in few tokens: a search by steps of llguidance's matcher."""

import heapq
from collections.abc import Sequence
from itertools import count, islice
from typing import TYPE_CHECKING

from keye.config.regex import written_out

if TYPE_CHECKING:
    from llguidance import LLMatcher

# What ends something in JSON comes first, what goes on with it next, and what begins something last.
_ENDS, _BEGINNINGS = b'"}],', b"eE[{-+. \n\t\r\\"
_LETTERS = b"0123456789ntfabcdghijklmopqrsuvwxyzABCDFGHIJKLMNOPQRSTUVWXYZ"
_ORDER = [*_ENDS, *_LETTERS, *sorted(set(range(256)) - {*_ENDS, *_LETTERS, *_BEGINNINGS}), *_BEGINNINGS]
# So many ways are looked at where there is a choice, for so many steps of about 20 microseconds each: first the
# likeliest alone. Where it leads nowhere, others too, each after the first has led nowhere for as many steps more.
_SEARCHES = ((1, 600), (8, 250))
_DETOUR = 24


class Letters:
    """The tokens that are one byte each, of a vocabulary `tokens`."""

    def __init__(self, tokens: Sequence[bytes]) -> None:
        self._ids = {token[0]: token_id for token_id, token in reversed(list(enumerate(tokens))) if len(token) == 1}
        self._ordered = [self._ids[byte] for byte in _ORDER if byte in self._ids]
        self._end_of_text, *self._ends = (self._ids.get(byte) for byte in _ENDS)
        self._no_syntax = self._ids.get(ord("x"))
        # Behind a digit a nought may say nothing new without end, as in 0.000.
        digits = [self._ids[byte] for byte in b"1234567890" if byte in self._ids]
        self._behind_digits = [*self._ordered[:4], *digits, *(each for each in self._ordered[4:] if each not in digits)]
        self._digits = {*digits, self._ids.get(ord("."))}

    def allowed_by(self, mask: bytes, before: int | None, hint: "Hint", at: int, most: int) -> tuple[list[int], int]:
        """At most so many that may follow the token `before`, the likeliest to lead to an end first; and how far the
        hint."""

        def is_allowed(token_id: int | None) -> bool:
            return token_id is not None and bool(mask[token_id // 8] >> token_id % 8 & 1)

        # Looked up one by one, as far as need be: a mask is asked at each step.
        allowed = filter(is_allowed, self._behind_digits if before in self._digits else self._ordered)
        # Within a text what ends an object ends nothing, and in what is no JSON nothing does.
        ends = [] if not hint.is_json else [self._end_of_text]
        ends += [] if is_allowed(self._no_syntax) else self._ends
        if not any(map(is_allowed, ends)):
            for place in (*range(at, len(hint.patterns)), *range(at)):
                token_id = self._ids.get(hint.patterns[place])
                if token_id is not None and is_allowed(token_id):
                    others = (other for other in allowed if other != token_id)
                    return [token_id, *islice(others, most - 1)], place + 1
        return list(islice(allowed, most)), at


class Hint:
    """Texts that the `patterns` of a schema match, one behind the other."""

    def __init__(self, schema: object) -> None:
        self.is_json = isinstance(schema, dict)
        self.patterns = _patterns(schema)


# Formats of which no letter alone leads to the end: those they match.
_FORMATS = {"email": "a@a.aa", "uri": "a:a", "duration": "P1D"}


def _patterns(schema: object) -> bytes:
    match schema:
        case str():
            return written_out(schema)[1].encode()
        case dict():
            own = [schema["pattern"]] if isinstance(schema.get("pattern"), str) else []
            if isinstance(schema.get("format"), str):
                own.append(_FORMATS.get(schema["format"], ""))
            step, least = schema.get("multipleOf"), schema.get("minimum")
            if isinstance(step, int) and isinstance(least, int) and step > 1:
                # No digit alone leads to it.
                own.append(str(-(-least // step) * step))
            inner = [each for each in schema.values() if not isinstance(each, str)]
            return b"".join(_patterns(each) for each in (*own, *inner))
        case list():
            return b"".join(_patterns(each) for each in schema if isinstance(each, dict))
    return b""


def shortest_closing(
    matcher: "LLMatcher", letters: Letters, hint: Hint, max_tokens: int, ways: Sequence[Sequence[int]] = ()
) -> list[int] | None:
    """Tokens with which the matcher accepts the whole: few, if not the fewest. None where the search finds none.

    `ways` are tokens to try first, before what the grammar captures as `begun`. Leaves the matcher as it is.
    """
    number = count()
    for most_ways, max_steps in _SEARCHES:
        found: list[tuple[int, int, LLMatcher, list[int], list[int], int]] = [
            (0, next(number), matcher.deep_copy(), [], [], 0)
        ]
        for _ in range(max_steps):
            if not found:
                break
            cost, _, parent, tokens, added, at = heapq.heappop(found)
            state = parent if most_ways == 1 else parent.deep_copy()
            if not state.consume_tokens(added):
                continue
            if not state.is_accepting() and (forced := state.compute_ff_tokens()):
                added = added + forced
                if not state.consume_tokens(forced):
                    continue
            tokens = tokens + added
            if len(tokens) <= max_tokens and state.is_accepting():
                return tokens
            if len(tokens) >= max_tokens or state.is_stopped():
                continue
            is_begun = not ways or state.get_capture("begun") is not None
            choices = [] if is_begun else [list(way) for way in ways if state.validate_tokens(list(way)) == len(way)]
            if not choices:
                mask = state.compute_bitmask()
                before = tokens[-1] if tokens else None
                allowed, at = letters.allowed_by(mask, before, hint, at, most_ways)
                choices = [[token] for token in allowed]
            for rank, choice in enumerate(choices[:most_ways]):
                heapq.heappush(found, (cost + 1 + _DETOUR * (rank > 0), next(number), state, tokens, choice, at))
    return None
