"""What a step may compute, as memory that ran out has taught; and which errors say that it ran out."""

import logging

import torch

from keye.worker.engine.step_plan import StepLimits

logger = logging.getLogger(__name__)

FIRST_REST = 1000

# Libraries beside torch's own allocator say it in words only.
_PHRASES = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "DEVICE_ALLOCATION_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """The device, or the host, had no room for what was asked; smaller, the same may well succeed."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in _PHRASES)


class MemoryLimits:
    """`now` starts at the configured limits, falls where memory runs out, and doubles after a rest without that.

    Memory may have been another process's for a while. The rest doubles with each fall, so that a device that really
    is too small is tried ever more rarely.
    """

    def __init__(self, configured: StepLimits) -> None:
        self.now = configured
        self._configured = configured
        self._rest = FIRST_REST
        self._num_calm_steps = 0

    def lower(self, max_step_tokens: int) -> None:
        """So many tokens are the most to try in a step from now on."""
        if max_step_tokens >= self.now.max_step_tokens:
            return
        if self._num_calm_steps:
            self._rest *= 2
            self._num_calm_steps = 0
        self._set(max_step_tokens)
        logger.warning("out of memory: at most %d tokens a step, twice that in %d steps", max_step_tokens, self._rest)

    def count_step(self) -> None:
        """Another step has ended."""
        if self.now == self._configured:
            return
        self._num_calm_steps += 1
        if self._num_calm_steps % self._rest == 0:
            self._set(min(2 * self.now.max_step_tokens, self._configured.max_step_tokens))

    def _set(self, max_step_tokens: int) -> None:
        self.now = StepLimits(min(max_step_tokens, self._configured.max_running), max_step_tokens)
