"""Keeps who waits, who runs and whose the blocks are, and carries out plans. Touches no tensors."""

from bisect import insort
from collections.abc import Iterator
from itertools import chain

from keye.worker.engine.sequence import Sequence
from keye.worker.engine.step_plan import StepLimits, StepPlan, plan_step


class BlockPool:
    """Which blocks of the key-value cache are free, of those numbered 0 to num_blocks - 1."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, num_blocks: int) -> list[int]:
        """Raises `ValueError` when so many are not free: the plan of the step has to see to it."""
        if num_blocks > len(self._free):
            raise ValueError(f"{num_blocks} blocks are asked for, {len(self._free)} of {self.num_blocks} are free")
        remaining = len(self._free) - num_blocks
        taken = self._free[remaining:]
        del self._free[remaining:]
        return taken

    def give_back(self, blocks: list[int]) -> None:
        self._free.extend(blocks)


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
        plan = plan_step(self.waiting, self.running, self.pool.num_free, self.pool.block_size, self.limits)
        for sequence in plan.preempted:
            self.running.remove(sequence)
            self._release(sequence)
            _insert(self.waiting, sequence)
        del self.waiting[: len(plan.admitted)]
        for sequence in plan.admitted:
            _insert(self.running, sequence)
        for sequence, _ in plan.chunks:
            if num_missing := sequence.num_missing_blocks(self.pool.block_size):
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
