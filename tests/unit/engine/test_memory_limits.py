"""Which errors say that memory ran out, and how far a step is held back after that."""

import pytest
import torch

from keye.worker.engine.memory import FIRST_REST, MemoryLimits, is_out_of_memory
from keye.worker.engine.step_plan import StepLimits


def more_than_there_is() -> BaseException:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**55, dtype=torch.uint8)
    return raised.value


@pytest.mark.parametrize(
    "error",
    [
        more_than_there_is(),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
    ids=lambda error: f"{type(error).__name__}-{str(error)[:40]}",
)
def test_memory_that_ran_out_is_known_by_all_its_names(error: BaseException) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), ValueError("out of memory")],
    ids=lambda error: type(error).__name__,
)
def test_other_faults_are_not_taken_for_it(error: BaseException) -> None:
    assert not is_out_of_memory(error)


def steps_until_raised(limits: MemoryLimits) -> int:
    before, steps = limits.now, 0
    while limits.now == before:
        limits.count_step()
        steps += 1
        assert steps < 100_000, "the limit never rises again"
    return steps


def test_limit_rises_again_step_by_step_up_to_what_was_configured() -> None:
    configured = StepLimits(max_running=64, max_step_tokens=2048)
    limits = MemoryLimits(configured)
    limits.lower(600)
    limits.lower(300)
    limits.lower(900)
    assert limits.now == StepLimits(64, 300)
    seen = []
    while limits.now != configured:
        assert steps_until_raised(limits) == FIRST_REST
        seen.append(limits.now.max_step_tokens)
    assert seen == [600, 1200, 2048]


def test_device_that_is_too_small_is_tried_ever_more_rarely() -> None:
    limits = MemoryLimits(StepLimits(max_running=64, max_step_tokens=2048))
    rests = []
    for _ in range(4):
        limits.lower(40)
        assert limits.now == StepLimits(40, 40)
        rests.append(steps_until_raised(limits))
    assert rests == [FIRST_REST, 2 * FIRST_REST, 4 * FIRST_REST, 8 * FIRST_REST]
