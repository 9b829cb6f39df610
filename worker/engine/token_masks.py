"""Which tokens a step's sequences may go on with: filled by llguidance's threads while the model computes the step."""

import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from keye.worker.engine.sequence import Sequence
from keye.worker.model.device import send

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher

# To wake a thread, and to share Python's lock with it, takes longer than most masks of small vocabularies do: those are
# filled once the step is launched, where a GPU leaves the time.
_BRIEFLY_SECONDS = 0.0005

# For each byte of a mask what is added to the logits of its eight tokens, the lowest bit first.
_ADDED = np.where(np.arange(256)[:, None] >> np.arange(8) & 1, 0, -np.inf).astype(np.float32)


class TokenMasks:
    """Of one engine. Costs nothing before the first sequence that has a constraint."""

    def __init__(self) -> None:
        # One: whatever becomes of a step, its masks are filled before those of the next, which tell of the same
        # matchers.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine-masks")
        self._filling: Future[None] | None = None
        self._executor: LLExecutor | None = None
        self._fill_seconds = 0.0
        self._added: Tensor | None = None

    def begin(self, sequences: Seq[Sequence]) -> "StepMasks | None":
        """Fill those of the sequences of which a step chooses the next token; None where all may be anything."""
        constrained = [(row, s.constraint) for row, s in enumerate(sequences) if s.constraint is not None]
        if not constrained:
            return None
        # A bit a token, in words of 32.
        num_bytes = 4 * -(-constrained[0][1].vocab_size // 32)
        packed = np.zeros((len(constrained), num_bytes), np.uint8)
        matchers = [constraint.matcher for _, constraint in constrained]
        fill: Callable[[], None] = partial(self._fill, matchers, packed)
        is_filling = self._filling is not None and not self._filling.done()
        if is_filling or self._fill_seconds >= _BRIEFLY_SECONDS:
            self._filling = self._thread.submit(self._fill, matchers, packed, in_parallel=True)
            fill = self._filling.result
        return StepMasks(self, [row for row, _ in constrained], packed, fill)

    def _fill(self, matchers: "Seq[LLMatcher]", packed: np.ndarray, in_parallel: bool = False) -> None:
        # They are given addresses: `packed` has to outlive the call, whatever becomes of the step.
        began_at, address, size = time.perf_counter(), packed.ctypes.data, packed.shape[1]
        if in_parallel:
            if self._executor is None:
                from llguidance import LLExecutor

                self._executor = LLExecutor()
            numbered = [(matcher, place) for place, matcher in enumerate(matchers)]
            self._executor.unsafe_compute_mask_ptr(numbered, address, size, len(packed))
        else:
            for place, matcher in enumerate(matchers):
                matcher.unsafe_compute_mask_ptr(address + place * size, size)
        self._fill_seconds = time.perf_counter() - began_at

    def added(self, device: torch.device) -> Tensor:
        if self._added is None:
            self._added = send(_ADDED, device)
        return self._added


class StepMasks:
    """Of one step: `packed` [n, bytes] belongs to `rows` of its logits."""

    def __init__(self, masks: TokenMasks, rows: list[int], packed: np.ndarray, fill: Callable[[], None]) -> None:
        """`fill` returns once they are filled."""
        self._masks = masks
        self._rows = rows
        self._packed = packed
        self._fill = fill

    def apply(self, logits: Tensor) -> Tensor:
        """Logits [n, V], minus infinity for what the sequence of a row may not go on with."""
        self._fill()
        num_rows, (num_logits, width) = len(self._rows), logits.shape
        packed = send(self._packed, logits.device).view(-1).int()
        added = self._masks.added(logits.device).index_select(0, packed).view(num_rows, -1)[:, :width]
        if num_rows == num_logits:
            return added.add_(logits)
        rows = send(np.array(self._rows, np.int64), logits.device)
        return logits.index_copy(0, rows, added.add_(logits.index_select(0, rows)))
