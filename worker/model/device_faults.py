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

_CAPTURE_CODES = range(900, 909)  # cudaErrorStreamCaptureUnsupported to cudaErrorStreamCaptureWrongThread


def is_out_of_memory(error: BaseException) -> bool:
    """The device, or the host, had no room for what was asked; smaller, the same may well succeed."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in _PHRASES)


def is_device_lost(error: BaseException) -> bool:
    """Nothing runs on the device any more in this process: whatever is tried next fails as well."""
    return isinstance(error, torch.AcceleratorError) and not (is_out_of_memory(error) or _is_of_capturing(error))


def _is_of_capturing(error: torch.AcceleratorError) -> bool:
    """A step could not be recorded as a graph; it runs as well without."""
    code = getattr(error, "error_code", None)
    # A torch that gives no code gives CUDA's sentence; of its sentences only these speak of capturing.
    return "captur" in str(error) if code is None else code in _CAPTURE_CODES
