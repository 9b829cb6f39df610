"""What an answer may go on with where it has to fit a schema: llguidance's matcher, told in a model's tokens.

Thinking goes before it, unbound but for its tags. Touches no tensors; the masks are filled elsewhere.
"""

import json
import re
from collections.abc import Sequence
from copy import copy
from threading import Lock
from typing import Self
from weakref import WeakKeyDictionary

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from keye.config.closing import Hint, Letters, shortest_closing
from keye.config.codes import ErrorCode
from keye.config.faults import Fault
from keye.config.response_schema import MAX_COUNT, ResponseSchema, Tokens, answer_rule, grammar_limits
from keye.worker.engine.detokenizer import TokenBytes
from keye.worker.engine.thinking_budget import ThinkingTags
from keye.worker.model.processor import KeyeProcessor


class Vocabulary:
    """A model's tokens as grammars know them. Building one takes 0.3 seconds for 150,000 tokens: see `of`."""

    def __init__(self, processor: KeyeProcessor) -> None:
        self._text_tokenizer = tokenizer = processor.tokenizer
        token_bytes, tags = TokenBytes(tokenizer), ThinkingTags.of(tokenizer)
        # No text may come to be one of these, but by its letters.
        special = {*tokenizer.all_special_ids, *processor.eos_token_ids, *(tags[:2] if tags else ())}
        tokens = [
            f"<{token_id}>".encode() if token_id in special else token_bytes[token_id]
            # The output layer is wider than the tokenizer: what is behind it is nothing.
            for token_id in range(max(processor.config.vocab_size, len(tokenizer)))
        ]
        eos, *_ = self.eos_token_ids = list(processor.eos_token_ids)
        wrapped = TokenizerWrapper(Tokens(tokens, sorted(special), eos, self._encode_plainly))
        self.tokenizer = LLTokenizer(wrapped, eos_token=self.eos_token_ids)
        self.letters = Letters([b"" if token_id in special else token for token_id, token in enumerate(tokens)])
        self.tags = tags
        self.token_bytes = token_bytes
        # What ends thinking and begins an answer.
        self.ways = [self._encode(tag) for tag in ("</think>", "</analysis>", "<answer>")]
        # Anything may be thought, but what is special.
        self.thoughts = _ranges([n for n, token in enumerate(tokens) if token and n not in special])

    def _encode(self, text: str) -> list[int]:
        return list(self._text_tokenizer.encode(text, add_special_tokens=False))

    def _encode_plainly(self, text: str) -> list[int]:
        # Cut so that nothing is read as a special token.
        return [token_id for part in re.split("(?<=<)", text) if part for token_id in self._encode(part)]

    @classmethod
    def of(cls, processor: KeyeProcessor) -> "Vocabulary":
        """The same for every answer of this processor."""
        with _building:
            if processor not in _vocabularies:
                _vocabularies[processor] = cls(processor)
            return _vocabularies[processor]


_building = Lock()
_vocabularies: "WeakKeyDictionary[KeyeProcessor, Vocabulary]" = WeakKeyDictionary()


def _ranges(token_ids: Sequence[int]) -> str:
    """As llguidance writes them, such as 3-5,7-7; ids ascend."""
    firsts = [n for before, n in zip([-2, *token_ids], token_ids, strict=False) if n != before + 1]
    lasts = [n for n, after in zip(token_ids, [*token_ids[1:], -2], strict=True) if after != n + 1]
    return ",".join(f"{first}-{last}" for first, last in zip(firsts, lasts, strict=True))


def _grammar(schema: ResponseSchema, thinking: str, vocabulary: Vocabulary) -> str:
    """Where the model may think, its answer begins with `<answer>`: nothing before is taken for it, nor it for that."""
    if thinking == "no_think":
        return "start: answer\n" + answer_rule(schema)
    if tags := vocabulary.tags:
        thought = f"thought: <[{tags.opening}]> <[{vocabulary.thoughts}]>* <[{tags.closing}]>\n"
    else:
        thought = "thought[lazy]: /<think>(?s:.*)<\\/think>/\n"
    head = "thought" if thinking == "think" else "analysis? thought?"
    analysis = "analysis[lazy]: /<analysis>(?s:.*)<\\/analysis>/\n" if thinking == "auto" else ""
    begun = f'start: begun answer\nbegun[capture]: {head} "<answer>"\n'
    return begun + thought + analysis + answer_rule(schema, is_tagged=True)


class Constraint:
    """Of one sequence: what it may be, as far as it has come."""

    def __init__(self, schema: ResponseSchema, thinking: str, vocabulary: Vocabulary, max_new_tokens: int) -> None:
        """Raises `Fault` where the schema cannot be enforced, or so few tokens do not suffice for any answer."""
        self._vocabulary = vocabulary
        self._hint = Hint(schema)
        # What refers to itself may nest on and on, and each level ask for more than was written of it.
        self._share = 3 if '"$ref"' in json.dumps(schema) else 2
        self._max_new_tokens = max_new_tokens
        self._is_thinking = thinking != "no_think"
        self.matcher = LLMatcher(
            vocabulary.tokenizer, _grammar(schema, thinking, vocabulary), log_level=0, limits=grammar_limits()
        )
        if self.matcher.is_error():
            raise Fault(ErrorCode.INVALID_JOB, f"response_schema cannot be enforced: {self._error}")
        self.has_cut = False
        self.is_complete = False
        """Nothing can follow, or nothing but what says nothing more."""
        self._closing: list[int] | None = None
        shortest = self._closing_of(self.matcher, MAX_COUNT)
        if shortest is None or len(shortest) > max_new_tokens:
            least = "no few tokens" if shortest is None else f"{len(shortest)} tokens"
            raise Fault(
                ErrorCode.ANSWER_INCOMPLETE,
                f"The shortest answer that fits response_schema takes {least}, max_new_tokens is {max_new_tokens}. "
                "Raise max_new_tokens, or ask for less.",
            )
        self._shortest = shortest
        self._look_at = _next_look(max_new_tokens, shortest, self._share)

    @classmethod
    def of(cls, processor: KeyeProcessor, schema: ResponseSchema, thinking: str, max_new_tokens: int) -> Self:
        """In this processor's tokens."""
        return cls(schema, thinking, Vocabulary.of(processor), max_new_tokens)

    def copy(self) -> Self:
        """Another, for a sequence of its own."""
        other = copy(self)
        other.matcher = self.matcher.deep_copy()
        return other

    @property
    def vocab_size(self) -> int:
        return int(self._vocabulary.tokenizer.vocab_size)

    def fault(self, *, has_ended: bool) -> Fault | None:
        """Why the answer, as far as it has come, is none or cannot become one."""
        if self.matcher.is_error():
            reason = f"The answer went beyond what can be checked against response_schema: {self._error}."
            return Fault(ErrorCode.ANSWER_INCOMPLETE, f"{reason} Use a simpler schema.")
        if has_ended and not self.matcher.is_accepting():
            reason = f"The answer did not come to an end within max_new_tokens {self._max_new_tokens}"
            return Fault(ErrorCode.ANSWER_INCOMPLETE, f"{reason}, as response_schema has it. Raise max_new_tokens.")
        return None

    @property
    def _error(self) -> str:
        return " ".join(self.matcher.get_error().split("\n")[0].split())[:200]

    def take(self, token_id: int, num_left: int) -> int:
        """The next token: the one that was chosen, or where no more are left than that, what brings it to its end.

        `num_left` counts this one.
        """
        if self._closing is None and num_left <= self._look_at:
            self._look(token_id, num_left)
        if self._closing is not None:
            token_id = self._closing.pop(0) if self._closing else self._vocabulary.eos_token_ids[0]
        self.matcher.consume_token(token_id)
        self._see(token_id)
        return token_id

    def _look(self, token_id: int, num_left: int) -> None:
        """Whether there are tokens enough to end, once this one is taken."""
        after = self.matcher.deep_copy()
        if after.consume_token(token_id):
            closing = self._shortest if self._still_ends(after, num_left - 1) else self._closing_of(after, num_left - 1)
            if closing is not None:
                self._shortest, self._look_at = closing, _next_look(num_left - 1, closing, self._share)
                return
        self._closing = self._closing_of(self.matcher, num_left)
        self.has_cut = self._closing is not None
        self._look_at = num_left // 2

    def _still_ends(self, matcher: LLMatcher, num_left: int) -> bool:
        """Whether what ended it before does now, as within a text that goes on: a tenth of the cost of a search."""
        ended = matcher.deep_copy()
        return len(self._shortest) <= num_left and ended.consume_tokens(self._shortest) and ended.is_accepting()

    def _closing_of(self, matcher: LLMatcher, num_left: int) -> list[int] | None:
        vocabulary = self._vocabulary
        ways = vocabulary.ways if self._is_thinking else ()
        return shortest_closing(matcher, vocabulary.letters, self._hint, num_left, ways)

    def _see(self, token_id: int) -> None:
        if not self.matcher.is_accepting() or self.matcher.is_error():
            return
        # What JSON is once it ends does not go on, but for a number.
        ends_itself = self._hint.is_json and not self._vocabulary.token_bytes[token_id][-1:].isdigit()
        self.is_complete = ends_itself or self._closing == [] or self.matcher.is_stopped()


def _next_look(num_left: int, closing: Sequence[int], share: int) -> int:
    """With how many tokens left it is to be looked at again how many it takes to end.

    The way to the end grows by what is begun: seldom by as many tokens as this leaves, where it grows by less than
    `share` for each token, the one that is written counted in.
    """
    to_spare = num_left - len(closing)
    return num_left - max(to_spare - _MOST_BEGUN, 0) // share


# Tokens that may have to follow one that begins something.
_MOST_BEGUN = 48
