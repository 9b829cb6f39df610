"""Joins the text of one attempt, as the engine gives it, into few events. Parting it is the splitter's."""

import time

from keye.config.event import Channel
from keye.worker.results.event_writer import AttemptEvents
from keye.worker.results.thinking import Piece, ThinkingSplitter

MAX_WAIT_SECONDS = 0.1
MAX_WAITING_TOKENS = 32


class Coalescer:
    """Writes an event when its text has waited for `MAX_WAIT_SECONDS` or is of `MAX_WAITING_TOKENS`; the first at once.

    Text that could not be written is written with the next.
    """

    def __init__(self, events: AttemptEvents) -> None:
        self._events = events
        self._splitter = ThinkingSplitter()
        self._waiting: list[Piece] = []
        self._offsets: dict[Channel, int] = {"reasoning": 0, "answer": 0}
        self._num_tokens = 0
        self._num_tokens_told = 0
        self._told_at = 0.0

    def push(self, text: str, num_tokens: int, is_last: bool = False) -> None:
        """Text that came, never half a character, and how many tokens it took; the last is left to `flush`."""
        self._num_tokens += num_tokens
        self._add(self._splitter.push(text))
        is_much = self._num_tokens - self._num_tokens_told >= MAX_WAITING_TOKENS
        if not is_last and (is_much or time.monotonic() - self._told_at >= MAX_WAIT_SECONDS):
            self._tell()

    def flush(self) -> None:
        """Nothing follows: what waits is written with the end of the job."""
        self._add(self._splitter.flush())
        for channel, text in self._waiting:
            self._events.text(channel, text, self._offsets[channel], self._num_tokens, may_wait=True)
            self._offsets[channel] += len(text)
        self._waiting.clear()

    def _add(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            if self._waiting and self._waiting[-1].channel == piece.channel:
                piece = Piece(piece.channel, self._waiting.pop().text + piece.text)
            self._waiting.append(piece)

    def _tell(self) -> None:
        while self._waiting:
            channel, text = self._waiting[0]
            if not self._events.text(channel, text, self._offsets[channel], self._num_tokens):
                break
            self._offsets[channel] += len(text)
            self._waiting.pop(0)
            self._told_at = time.monotonic()
            self._num_tokens_told = self._num_tokens
