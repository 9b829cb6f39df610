"""Keeps who waits, who runs and whose the blocks are, and carries out plans. Touches no tensors."""

from bisect import insort
from collections.abc import Iterator
from itertools import chain

from keye.worker.engine.block_pool import BlockPool
from keye.worker.engine.sequence import Sequence
from keye.worker.engine.step_plan import StepLimits, StepPlan, plan_step


class Scheduler:
    """Both lists are sorted by seniority."""

    def __init__(self, pool: BlockPool, limits: StepLimits) -> None:
        self.pool = pool
        self.limits = limits
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.unproven: list[int] = []
        """Blocks that nobody holds any more and that may hold what is no number: to be wiped before the next run."""

    def __iter__(self) -> Iterator[Sequence]:
        """Every sequence that has not ended."""
        return chain(self.running, self.waiting)

    @property
    def is_idle(self) -> bool:
        return not (self.running or self.waiting)

    def add(self, sequence: Sequence) -> None:
        _insert(self.waiting, sequence)

    def start_step(self) -> StepPlan:
        """Plan a step and move sequences and blocks accordingly: each chunk then has the blocks it writes to."""
        plan = plan_step(self.waiting, self.running, self.pool, self.limits)
        for sequence in plan.preempted:
            self.running.remove(sequence)
            self._release(sequence)
            _insert(self.waiting, sequence)
        # Before any is taken, which may be one of these.
        for sequence, found in plan.admitted.items():
            self.pool.hold(found)
            sequence.block_table = found
            sequence.num_cached = sequence.num_proven = len(found) * self.pool.block_size
            self.waiting.remove(sequence)
            _insert(self.running, sequence)
        for sequence, _ in plan.chunks:
            if num_missing := sequence.num_missing_blocks(self.pool.block_size):
                sequence.block_table += self.pool.take(num_missing)
        return plan

    def publish(self, sequence: Sequence) -> None:
        """A token has been chosen from finite numbers, which all keys and values of the sequence went into: from now on
        its full blocks are found by others."""
        block_keys, block_size = sequence.pending.block_keys, self.pool.block_size
        first, last = sequence.num_proven // block_size, sequence.num_cached // block_size
        sequence.num_proven = sequence.num_cached
        if block_keys is not None and first < last:
            block_keys.extend(sequence.generated_ids, last)
            for number in range(first, last):
                self.pool.publish(sequence.block_table[number], block_keys.keys[number])

    def remove(self, sequence: Sequence, *, has_failed: bool = False) -> None:
        """The sequence has ended, wherever it was; its blocks are free again. `has_failed` where a step of it may have
        written to them and come to nothing."""
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self._release(sequence, has_failed=has_failed)

    def _release(self, sequence: Sequence, *, has_failed: bool = False) -> None:
        blank = self.pool.give_back(sequence.block_table)
        if has_failed or sequence.num_proven < sequence.num_cached:
            self.unproven += blank
        sequence.block_table = []
        sequence.num_cached = sequence.num_proven = 0


def _insert(sequences: list[Sequence], sequence: Sequence) -> None:
    insort(sequences, sequence, key=lambda other: other.seniority)
