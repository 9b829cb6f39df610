"""One generation as the engine steps it: its tokens, its blocks, its text. Touches no tensors."""

import random
from collections.abc import Callable, Collection

from keye.config.faults import Fault
from keye.worker.engine.block_pool import BlockKey
from keye.worker.engine.detokenizer import Detokenizer, StopStrings, TokenBytes
from keye.worker.engine.inbox import FinishReason, Generated, PendingGeneration
from keye.worker.engine.thinking_budget import ThinkingBudget, ThinkingTags

SECONDS_A_PRIORITY = 10


class Sequence:
    """`num_cached` of its tokens have keys and values in the blocks of `block_table`.

    `num_proven` of those have led to numbers that are finite; `num_cached_tokens` of its prompt others had computed.
    """

    def __init__(
        self,
        pending: PendingGeneration,
        token_bytes: TokenBytes,
        eos_token_ids: Collection[int],
        thinking_tags: ThinkingTags | None = None,
    ) -> None:
        self.pending = pending
        self.num_prompt_tokens = len(pending.prompt.input_ids)
        self.constraint = pending.constraint
        self.rng = random.Random(pending.sampling.seed)
        self.generated_ids: list[int] = []
        self.logprob_of: Callable[[int], float] | None = None
        """Of any token in the place of the next one, where it asks for logprobs and the next one is chosen."""
        self._logprobs: list[float] = []
        self.block_table: list[int] = []
        self.num_cached = 0
        self.num_proven = 0
        self.num_cached_tokens = 0
        self.started_at: float | None = None
        self._first_token_at: float | None = None
        self.eos_token_ids = eos_token_ids
        most = pending.sampling.max_thinking_tokens
        self._budget = None if most is None or thinking_tags is None else ThinkingBudget(thinking_tags, most)
        self._detokenizer = Detokenizer(token_bytes)
        self._stop_strings = StopStrings(pending.sampling.stop)
        self._text: list[str] = []

    @property
    def seniority(self) -> float:
        """Who goes first: who came first, each step of priority counting as if it had come ten seconds later.

        So nobody waits for ever behind a flow of higher priority, and among equals it is first come, first served.
        """
        return self.pending.submitted_at + SECONDS_A_PRIORITY * self.pending.priority

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

    @property
    def must_go_on(self) -> bool:
        """Nothing ends it yet: it has fewer than its `min_tokens`."""
        return len(self.generated_ids) < self.pending.sampling.min_tokens

    def num_missing_blocks(self, block_size: int) -> int:
        """How many blocks its tokens take beyond those it has."""
        return -(-self.num_tokens // block_size) - len(self.block_table)

    def keys_to_find(self, block_size: int) -> list[BlockKey]:
        """Of the blocks that others may have computed: all that are full, but one token is always to be computed."""
        known = self.pending.block_keys
        return [] if known is None else known.keys[: (self.num_tokens - 1) // block_size]

    def is_given_up(self, now: float) -> bool:
        """Its job abandoned it, or its deadline has passed."""
        return self.pending.is_abandoned or now >= self.pending.deadline

    def append(self, token_id: int, now: float) -> FinishReason | None:
        """Take the next token, deliver the text it completes, say whether the sequence is over.

        Where its thinking has to end, or its answer while tokens are left to end it with, another one is taken.
        """
        if self._budget is not None:
            token_id = self._budget.take(token_id, goes_on=self._detokenizer.goes_on(token_id))
        if self.constraint is not None:
            num_left = self.pending.sampling.max_new_tokens - len(self.generated_ids)
            token_id = self.constraint.take(token_id, num_left)
        self.generated_ids.append(token_id)
        if self.logprob_of is not None:
            self._logprobs.append(self.logprob_of(token_id))
            self.logprob_of = None
        if self._first_token_at is None:
            self._first_token_at = now
        text = self._stop_strings.push(self._detokenizer.push(token_id), may_stop=not self.must_go_on)
        if text:
            self._text.append(text)
        self.pending.deliver(text, 1)
        if self.constraint is not None and self.constraint.is_complete:
            return "length" if self.constraint.has_cut else "stop"
        if self._stop_strings.is_hit or token_id in self.eos_token_ids:
            return "stop"
        return "length" if len(self.generated_ids) >= self.pending.sampling.max_new_tokens else None

    def unfit(self, reason: FinishReason | None) -> Fault | None:
        """Why its answer, that ends for this reason or goes on, does not fit what it has to."""
        return None if self.constraint is None else self.constraint.fault(has_ended=reason is not None)

    def end(self, reason: FinishReason, now: float) -> None:
        """Deliver what was held back, and the whole."""
        if not self._stop_strings.is_hit:
            rest = self._stop_strings.push(self._detokenizer.flush()) + self._stop_strings.flush()
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
                first_token_seconds=None if self._first_token_at is None else self._first_token_at - submitted_at,
                generate_seconds=now - started_at,
                has_cut_thinking=self._budget is not None and self._budget.has_cut,
                logprobs=tuple(self._logprobs),
                num_cached_tokens=self.num_cached_tokens,
            )
        )
