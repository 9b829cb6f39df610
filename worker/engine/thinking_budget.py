"""How many tokens a model may think, counted by their ids, and what is written for it once they are spent.

Touches no tensors and knows no text.
"""

from typing import Any, NamedTuple, Self

# Of a character that is begun, so many tokens may be left; a model that begins another each time is not waited for.
_MOST_TOKENS_OF_A_CHARACTER = 3


class ThinkingTags(NamedTuple):
    """Token ids: of `<think>`, of `</think>`, and what ends thinking and begins the answer."""

    opening: int
    closing: int
    ending: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any) -> Self | None:
        """None where `<think>` or `</think>` is not a token of its own: then nobody could tell where thinking ends."""
        opening, closing = (tokenizer.encode(tag, add_special_tokens=False) for tag in ("<think>", "</think>"))
        if len(opening) != 1 or len(closing) != 1:
            return None
        return cls(opening[0], closing[0], tuple(tokenizer.encode("</think><answer>", add_special_tokens=False)))


class ThinkingBudget:
    """Of one sequence: `max_tokens` between `<think>` and `</think>`, of all such blocks together."""

    def __init__(self, tags: ThinkingTags, max_tokens: int) -> None:
        self._tags = tags
        self._num_left = max_tokens
        self._is_thinking = False
        self._forced: list[int] = []
        self.has_cut = False

    def take(self, chosen: int, *, goes_on: bool) -> int:
        """The next token: the one that was chosen, or what ends the thinking instead.

        `goes_on` where the chosen one continues a character that is begun, which is never cut in two.
        """
        opening, closing, ending = self._tags
        is_spent = self._is_thinking and self._num_left <= 0 and chosen != closing
        if is_spent and not (goes_on and self._num_left > -_MOST_TOKENS_OF_A_CHARACTER):
            self._forced, self.has_cut = list(ending), True
        token_id = self._forced.pop(0) if self._forced else chosen
        if token_id == closing:
            self._is_thinking = False
        elif self._is_thinking:
            self._num_left -= 1
        else:
            self._is_thinking = token_id == opening
        return token_id
