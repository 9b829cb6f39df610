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
        for sequence in plan.put_back:
            self.running.remove(sequence)
            self._release(sequence)
            _insert(self.waiting, sequence)
        del self.waiting[: len(plan.admitted)]
        for sequence in plan.admitted:
            _insert(self.running, sequence)
        for sequence, _ in plan.chunks:
            num_missing = self.pool.blocks_for(sequence.num_tokens) - len(sequence.block_table)
            if num_missing:
                sequence.block_table += self.pool.take(num_missing)
        return plan

    def remove(self, sequence: Sequence) -> None:
        """The sequence has ended, wherever it was; its blocks are free again."""
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pool.give_back(sequence.block_table)
        sequence.block_table = []
        sequence.num_cached = 0


def _insert(sequences: list[Sequence], sequence: Sequence) -> None:
    insort(sequences, sequence, key=lambda other: other.seniority)
