"""Decides what the next step computes, from counts and what blocks hold. Pure: changes nothing, touches no tensors."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from math import inf
from operator import attrgetter
from typing import NamedTuple

from keye.worker.engine.block_pool import BlockKey, BlockPool
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

    With each that is admitted come the blocks that are found of it. Decoding sequences come first, the longest of them
    ahead, so that those of like length attend side by side.
    """

    preempted: list[Sequence]
    admitted: dict[Sequence, list[int]]
    chunks: list[Chunk]


def plan_step(waiting: Seq[Sequence], running: Seq[Sequence], pool: BlockPool, limits: StepLimits) -> StepPlan:
    """Plan one step; `waiting` and `running` are sorted by seniority.

    Running sequences keep running: when the free blocks run out, or more run than may, the youngest is preempted.
    What is left of the step's tokens goes to prompts, the oldest first. A sequence is admitted only with blocks for all
    its tokens, and none before the one ahead of it, so that a large prompt is not overtaken for ever. It is passed over
    where one ahead of it is about to compute its next block, which it finds then; its place and its room are kept.
    """
    block_size = pool.block_size
    staying = list(running[: limits.max_running])
    preempted = list(running[limits.max_running :])
    num_missing = sum(sequence.num_missing_blocks(block_size) for sequence in staying)
    # Of blocks that sequences share, none is free before the last of them goes.
    while num_missing > (num_free := pool.num_free + pool.num_freed(sequence.block_table for sequence in preempted)):
        youngest = staying.pop()
        num_missing -= youngest.num_missing_blocks(block_size)
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

    admitted: dict[Sequence, list[int]] = {}
    num_running = len(staying)
    if preempted or num_left <= 0 or not waiting:
        return StepPlan(preempted, admitted, chunks)
    coming: dict[BlockKey, float] = {}
    for sequence in staying:
        if not sequence.is_decoding:
            _note_coming(coming, sequence, sequence.num_proven // block_size)
    for sequence in waiting:
        if num_left <= 0 or num_running >= limits.max_running:
            break
        keys = sequence.keys_to_find(block_size)
        found = pool.find(keys)
        # Not for one that goes after it: who comes between would hold up both.
        is_coming = len(found) < len(keys) and coming.get(keys[len(found)], inf) <= sequence.seniority
        num_needed = sequence.num_missing_blocks(block_size) - len(found) + pool.num_unheld(found)
        if is_coming:
            num_needed -= sum(key in coming for key in keys[len(found) :])
        # Beside others, a block each stays free: else whoever comes in is preempted a few steps later.
        if num_needed + num_running > num_free:
            break
        num_free -= num_needed
        num_running += 1
        if is_coming:
            continue
        admitted[sequence] = found
        _note_coming(coming, sequence, len(found))
        num_uncached = sequence.num_tokens - len(found) * block_size
        chunks.append(Chunk(sequence, min(num_uncached, num_left)))
        num_left -= chunks[-1].num_tokens
    return StepPlan(preempted, admitted, chunks)


def _note_coming(coming: dict[BlockKey, float], sequence: Sequence, num_there: int) -> None:
    """Others may wait for the blocks that it is to compute after so many: who goes first counts."""
    block_keys = sequence.pending.block_keys
    for key in [] if block_keys is None else block_keys.keys[num_there:]:
        coming[key] = min(sequence.seniority, coming.get(key, inf))
