"""What an error says of the device: it has no room for what was asked, or it is lost."""

import torch

# Libraries beside torch's own allocator say it in words only.
_PHRASES = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "DEVICE_ALLOCATION_FAILED",
)

# After these of CUDA's errors the device goes on: a kernel was not launched, or a step could not be captured.
_PASSING = {
    1: "invalid argument",
    9: "invalid configuration argument",
    98: "invalid device function",
    209: "no kernel image is available",
    701: "too many resources requested for launch",
    801: "operation not supported",
    **dict.fromkeys(range(900, 909), "captur"),
}


def is_out_of_memory(error: BaseException) -> bool:
    """The device, or the host, had no room for what was asked; smaller, the same may well succeed."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in _PHRASES)


def is_device_lost(error: BaseException) -> bool:
    """Nothing runs on the device any more in this process: whatever is tried next fails as well."""
    if not isinstance(error, torch.AcceleratorError) or is_out_of_memory(error):
        return False
    if (code := getattr(error, "error_code", None)) is not None:
        return code not in _PASSING
    # A torch that gives no code gives CUDA's sentence.
    return not any(phrase in str(error) for phrase in _PASSING.values())
