"""Decides what the next step computes, from counts alone. Pure: changes nothing and touches no tensors."""

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

from keye.worker.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class StepLimits:
    """How many sequences run at once, and how many tokens one step computes (never fewer than sequences run)."""

    max_running: int = 64
    max_step_tokens: int = 2048


class Chunk(NamedTuple):
    """The next `num_tokens` tokens of a sequence that are not in the cache yet."""

    sequence: Sequence
    num_tokens: int

    @property
    def reaches_end(self) -> bool:
        """After it the next token can be chosen."""
        return self.num_tokens == self.sequence.num_uncached


class StepPlan(NamedTuple):
    """Who loses their blocks, who gets blocks for the first time, and what is computed.

    Decoding sequences come first, the longest of them ahead, so that those of like length attend side by side.
    """

    preempted: list[Sequence]
    admitted: list[Sequence]
    chunks: list[Chunk]


def plan_step(
    waiting: Iterable[Sequence], running: Seq[Sequence], num_free: int, block_size: int, limits: StepLimits
) -> StepPlan:
    """Plan one step; `waiting` and `running` are sorted by seniority.

    Running sequences keep running: when the `num_free` blocks run out, or more run than may, the youngest is preempted.
    What is left of the step's tokens goes to prompts, the oldest first. A sequence is admitted only with blocks for all
    its tokens, and none before the one ahead of it, so that a large prompt is not overtaken for ever.
    """
    staying = list(running[: limits.max_running])
    preempted = list(running[limits.max_running :])
    num_free += sum(len(sequence.block_table) for sequence in preempted)
    num_missing = sum(sequence.num_missing_blocks(block_size) for sequence in staying)
    while num_missing > num_free:
        youngest = staying.pop()
        num_missing -= youngest.num_missing_blocks(block_size)
        num_free += len(youngest.block_table)
        preempted.append(youngest)
    num_free -= num_missing

    decoding = [sequence for sequence in staying if sequence.is_decoding]
    decoding.sort(key=attrgetter("num_cached"), reverse=True)
    chunks = [Chunk(sequence, 1) for sequence in decoding]
    num_left = limits.max_step_tokens - len(chunks)
    if len(chunks) < len(staying):
        for sequence in staying:
            if num_left > 0 and not sequence.is_decoding:
                chunks.append(Chunk(sequence, min(sequence.num_uncached, num_left)))
                num_left -= chunks[-1].num_tokens

    admitted: list[Sequence] = []
    if not preempted:
        for sequence in waiting:
            num_running = len(staying) + len(admitted)
            num_needed = sequence.num_missing_blocks(block_size)
            # Beside others, a block each stays free: else whoever comes in is preempted a few steps later.
            if num_left <= 0 or num_running >= limits.max_running or num_needed + num_running > num_free:
                break
            num_free -= num_needed
            admitted.append(sequence)
            chunks.append(Chunk(sequence, min(sequence.num_tokens, num_left)))
            num_left -= chunks[-1].num_tokens
    return StepPlan(preempted, admitted, chunks)
