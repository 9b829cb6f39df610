"""A checkpoint folder to a model in memory. The folder is checked whole before a weight is read."""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.utils.logging import disable_progress_bar

from keye.worker.model.checkpoint import check_checkpoint, in_short
from keye.worker.model.image_processing import ImageProcessor
from keye.worker.model.keye import KeyeForConditionalGeneration
from keye.worker.model.precision import Quantization
from keye.worker.model.processor import KeyeProcessor

# Of glibc's malloc.h, and its own bound.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_IN_HEAP = 32 * 2**20


class CheckpointFault(Exception):
    """The checkpoint folder cannot be loaded; `faults` holds every reason, not just the first."""

    def __init__(self, path: Path, faults: list[str]) -> None:
        self.faults = faults
        named = in_short(faults) if str(path) in faults[0] else f"{path}: {in_short(faults)}"
        super().__init__(named if len(faults) == 1 else f"{path} has {len(faults)} faults: {in_short(faults)}")


def load_model(
    path: Path | str,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    quantization: Quantization | None = None,
) -> KeyeForConditionalGeneration:
    """The model of either variant, in evaluation mode, on one device; `dtype` None keeps the checkpoint's own.

    `quantization` shrinks weights as they are read, so that the device never holds the whole at full size.

    Raises `CheckpointFault` with all faults at once: files and shards that are missing, cut off or say what cannot be,
    tensors that are missing, left over or of another shape than the config asks for.
    """
    folder = Path(path)
    require_whole(folder)
    disable_progress_bar()  # a daemon's log is no terminal
    with _freed_tensors_given_back() if quantization else nullcontext():
        model = AutoModelForImageTextToText.from_pretrained(
            folder,
            trust_remote_code=False,
            dtype=dtype or "auto",
            device_map={"": torch.device(device)},
            quantization_config=quantization,
            use_safetensors=True,
        )
    assert isinstance(model, KeyeForConditionalGeneration)
    model.visual.vision_model.embeddings.normalise = ImageProcessor.from_checkpoint(folder).normalise
    return model


def require_whole(folder: Path) -> None:
    """Raises `CheckpointFault` where the folder has faults, read by us or by transformers; no weight is looked at."""
    if faults := check_checkpoint(folder):
        raise CheckpointFault(folder, faults)
    reads: dict[str, Callable[[Path], object]] = {
        "config.json": AutoConfig.from_pretrained,
        "its tokenizer and processor": KeyeProcessor.from_checkpoint,
    }
    for files, read in reads.items():
        try:
            read(folder)
        except Exception as error:
            # What libraries raise for a file that makes no sense to them may be anything.
            told = " ".join(str(error).split())
            raise CheckpointFault(folder, [f"{files} cannot be read: {type(error).__name__}: {told:.500}"]) from error


@contextmanager
def _freed_tensors_given_back() -> Iterator[None]:
    """What a tensor is shrunk from is soon freed, and glibc would keep the room between tensors that stay.

    Left to itself it gives pages of their own to ever larger allocations only, up to `_LARGEST_IN_HEAP`, which is what
    it is told afterwards, when a forward pass takes the same room again and again.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, 2**20)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_IN_HEAP)
        mallopt(_M_TRIM_THRESHOLD, 2 * _LARGEST_IN_HEAP)
