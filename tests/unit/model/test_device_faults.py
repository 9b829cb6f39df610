"""Which errors say that memory ran out, which that the device is lost, and which neither."""

import pytest
import torch

from keye.worker.model.device_faults import is_device_lost, is_out_of_memory


def coded(sentence: str, code: int) -> torch.AcceleratorError:
    """As torch raises it, since it has codes."""
    error = torch.AcceleratorError(f"CUDA error: {sentence}")
    error.error_code = code  # type: ignore[attr-defined]
    return error


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


@pytest.mark.parametrize(
    "error",
    [
        coded("operation not permitted when stream is capturing", 900),
        coded("operation failed due to a previous error during capture", 901),
        coded("dependency created on uncaptured work in another stream", 905),
        coded("attempt to terminate a thread-local capture sequence from another thread", 908),
        coded("words of some later release", 906),
        torch.AcceleratorError("CUDA error: operation not permitted when stream is capturing"),
        torch.AcceleratorError("CUDA error: dependency created on uncaptured work in another stream"),
        coded("no kernel image is available for execution on the device", 209),
        torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device"),
        coded("out of memory", 2),
        RuntimeError("CUDA error: operation not permitted when stream is capturing"),
    ],
    ids=str,
)
def test_device_outlives_faults_of_capturing_and_launching_and_memory_that_ran_out(error: BaseException) -> None:
    assert not is_device_lost(error)


@pytest.mark.parametrize(
    "error",
    [
        coded("an illegal memory access was encountered", 700),
        coded("unspecified launch failure, met while capturing", 719),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    ],
    ids=str,
)
def test_device_is_lost_with_every_other_fault_of_its_own(error: BaseException) -> None:
    assert is_device_lost(error)
