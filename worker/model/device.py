"""What a model runs on: the device, its number format, how much memory is left for a cache, and what torch sees."""

from dataclasses import dataclass
from typing import Literal

import torch

# Of the memory that is free once the weights are in; the rest is for activations and the vision tower's peaks.
_GPU_CACHE_SHARE = 0.8
# Pages that are never written cost nothing, so this is a limit and no reservation.
_CPU_CACHE_BYTES = 2 * 2**30


def choose_device(asked: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """`auto` takes the first visible GPU where torch can use one. `cuda` never falls back to the CPU."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked)


def name_device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def cache_bytes(device: torch.device) -> int:
    """How many bytes keys and values may take, asked once the weights are in."""
    if device.type == "cpu":
        return _CPU_CACHE_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    return int(free * _GPU_CACHE_SHARE)


@dataclass(frozen=True, slots=True)
class TorchFacts:
    """What torch was built for (`cuda` None: the CPU only) and each GPU it can use: its name and bytes of memory."""

    version: str
    cuda: str | None
    num_threads: int
    gpus: tuple[tuple[str, int], ...]


def torch_facts() -> TorchFacts:
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return TorchFacts(
        version=torch.__version__,
        cuda=torch.version.cuda,
        num_threads=torch.get_num_threads(),
        gpus=tuple((gpu.name, gpu.total_memory) for gpu in found),
    )
