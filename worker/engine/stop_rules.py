"""When a sequence is over: end tokens, stop strings, and the number of new tokens. Pure, one object a sequence."""

from collections.abc import Collection, Sequence
from typing import Literal


class StopStrings:
    """Passes on a growing text up to the first stop string, which may arrive in pieces and is never shown."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.is_hit = False
        self._stop = tuple(stop)
        self._held = ""

    def push(self, piece: str) -> str:
        """The text that may be shown now: all but a tail that can still become a stop string."""
        if not self._stop:
            return piece
        text = self._held + piece
        hits = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if hits:
            self.is_hit = True
            self._held = ""
            return text[: min(hits)]
        num_held = max(_overlap(text, stop) for stop in self._stop)
        cut = len(text) - num_held
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """The text that was held back and is now known to be no stop string."""
        held, self._held = self._held, ""
        return held


class StopRules:
    """Which token ends a sequence of at most `max_new_tokens` tokens."""

    def __init__(self, end_token_ids: Collection[int], max_new_tokens: int) -> None:
        self._end_token_ids = frozenset(end_token_ids)
        self._max_new_tokens = max_new_tokens

    def reason_to_stop(self, token_id: int, num_generated: int) -> Literal["stop", "length"] | None:
        """What the newest token, the `num_generated`-th, means for the sequence."""
        if token_id in self._end_token_ids:
            return "stop"
        return "length" if num_generated >= self._max_new_tokens else None


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with, the whole of `stop` excepted."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
