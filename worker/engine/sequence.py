"""One generation as the engine steps it: its tokens, its blocks, its text. Touches no tensors."""

import random
from dataclasses import dataclass, field

from keye.worker.engine.detokenizer import Detokenizer
from keye.worker.engine.inbox import FinishReason, Generated, PendingGeneration
from keye.worker.engine.stop_rules import StopRules, StopStrings

SECONDS_A_PRIORITY = 10


@dataclass(slots=True, eq=False)
class Sequence:
    """`num_cached` of its tokens have keys and values in the blocks of `block_table`; `arrival` counts submissions."""

    pending: PendingGeneration
    arrival: int
    num_prompt_tokens: int
    stop_rules: StopRules
    stop_strings: StopStrings
    detokenizer: Detokenizer
    rng: random.Random
    generated_ids: list[int] = field(default_factory=list)
    block_table: list[int] = field(default_factory=list)
    num_cached: int = 0
    started_at: float | None = None
    first_token_at: float | None = None
    _text: list[str] = field(default_factory=list)

    @property
    def seniority(self) -> tuple[float, int]:
        """Who goes first: who came first, each step of priority counting as if it had come ten seconds later.

        So nobody waits for ever behind a flow of higher priority, and among equals it is first come, first served.
        """
        return self.pending.submitted_at + SECONDS_A_PRIORITY * self.pending.priority, self.arrival

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + len(self.generated_ids)

    @property
    def num_uncached(self) -> int:
        return self.num_prompt_tokens + len(self.generated_ids) - self.num_cached

    @property
    def is_decoding(self) -> bool:
        """Only the newest generated token is to be computed."""
        return self.num_cached >= self.num_prompt_tokens and self.num_uncached == 1

    def is_given_up(self, now: float) -> bool:
        """Its job abandoned it, or its deadline has passed."""
        deadline = self.pending.deadline
        return self.pending.is_abandoned or (deadline is not None and now >= deadline)

    def append(self, token_id: int, now: float) -> FinishReason | None:
        """Take the next token, deliver the text it completes, say whether the sequence is over."""
        self.generated_ids.append(token_id)
        if self.first_token_at is None:
            self.first_token_at = now
        text = self.stop_strings.push(self.detokenizer.push(token_id))
        if text:
            self._text.append(text)
        self.pending.deliver(text, 1)
        if self.stop_strings.is_hit:
            return "stop"
        return self.stop_rules.reason_to_stop(token_id, len(self.generated_ids))

    def end(self, reason: FinishReason, now: float) -> None:
        """Deliver what was held back, and the whole."""
        if not self.stop_strings.is_hit:
            rest = self.stop_strings.push(self.detokenizer.flush()) + self.stop_strings.flush()
            if rest:
                self._text.append(rest)
                self.pending.deliver(rest, 0)
        submitted_at = self.pending.submitted_at
        started_at = now if self.started_at is None else self.started_at
        self.pending.end(
            Generated(
                text="".join(self._text),
                token_ids=tuple(self.generated_ids),
                finish_reason=reason,
                num_prompt_tokens=self.num_prompt_tokens,
                queued_seconds=started_at - submitted_at,
                first_token_seconds=None if self.first_token_at is None else self.first_token_at - submitted_at,
                generate_seconds=now - started_at,
            )
        )
