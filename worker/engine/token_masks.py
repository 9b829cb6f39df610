"""Which tokens a step's sequences may go on with: filled by llguidance's threads while the model computes the step."""

from collections.abc import Sequence as Seq
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from keye.worker.engine.sequence import Sequence
from keye.worker.model.device import send

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher

# For each byte of a mask what is added to the logits of its eight tokens, the lowest bit first.
_ADDED = np.where(np.arange(256)[:, None] >> np.arange(8) & 1, 0, -np.inf).astype(np.float32)


class TokenMasks:
    """Of one engine. Costs nothing before the first sequence that has a constraint."""

    def __init__(self) -> None:
        # One: whatever becomes of a step, its masks are filled before those of the next, which tell of the same
        # matchers.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine-masks")
        self._executor: LLExecutor | None = None
        self._added: Tensor | None = None

    def begin(self, sequences: Seq[Sequence]) -> "StepMasks | None":
        """Fill those of the sequences of which a step chooses the next token; None where all may be anything."""
        constrained = [(row, s.constraint) for row, s in enumerate(sequences) if s.constraint is not None]
        if not constrained:
            return None
        # A bit a token, in words of 32.
        num_bytes = 4 * -(-constrained[0][1].vocab_size // 32)
        packed = np.zeros((len(constrained), num_bytes), np.uint8)
        filling = self._thread.submit(self._fill, [constraint.matcher for _, constraint in constrained], packed)
        return StepMasks(self, [row for row, _ in constrained], packed, filling)

    def _fill(self, matchers: "Seq[LLMatcher]", packed: np.ndarray) -> None:
        if self._executor is None:
            from llguidance import LLExecutor

            self._executor = LLExecutor()
        numbered = [(matcher, place) for place, matcher in enumerate(matchers)]
        # It is given an address: `packed` has to outlive the call, whatever becomes of the step.
        self._executor.unsafe_compute_mask_ptr(numbered, packed.ctypes.data, packed.shape[1], len(packed))

    def added(self, device: torch.device) -> Tensor:
        if self._added is None:
            self._added = send(_ADDED, device)
        return self._added


class StepMasks:
    """Of one step: `packed` [n, bytes] belongs to `rows` of its logits."""

    def __init__(self, masks: TokenMasks, rows: list[int], packed: np.ndarray, filling: "Future[None]") -> None:
        self._masks = masks
        self._rows = rows
        self._packed = packed
        self._filling = filling

    def apply(self, logits: Tensor) -> Tensor:
        """Logits [n, V], minus infinity for what the sequence of a row may not go on with."""
        self._filling.result()
        num_rows, (num_logits, width) = len(self._rows), logits.shape
        packed = send(self._packed, logits.device).view(-1).int()
        added = self._masks.added(logits.device).index_select(0, packed).view(num_rows, -1)[:, :width]
        if num_rows == num_logits:
            return added.add_(logits)
        rows = send(np.array(self._rows, np.int64), logits.device)
        return logits.index_copy(0, rows, added.add_(logits.index_select(0, rows)))
