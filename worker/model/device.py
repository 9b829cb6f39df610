"""What a model runs on, how numbers get there, and what torch sees of this machine."""

import os
import re
import shutil
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from keye.config.codes import DeviceSetting


def choose_device(asked: DeviceSetting) -> torch.device:
    """`auto` takes the first visible GPU where torch can use one. `cuda` never falls back to the CPU."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked)


def send(array: np.ndarray, device: torch.device) -> Tensor:
    """The array's numbers on the device; on a CPU the tensor shares its memory."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    # Pinned, because any other copy waits for all that the device is still to do.
    return tensor.pin_memory().to(device, non_blocking=True)


def keep_to_cores(device: torch.device, num_cores: int, num_decoders: int) -> None:
    """Keep torch's threads to a worker's cores, on a CPU to those that decoding leaves: they spin while they wait."""
    left = num_cores - num_decoders if device.type == "cpu" else num_cores
    torch.set_num_threads(max(1, min(torch.get_num_threads(), left)))


def name_device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def has_packed_kernels(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether `torch.nn.attention.varlen` runs there: half precision on Ampere or later, heads of whole eights."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or head_dim % 8:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


@dataclass(frozen=True, slots=True)
class TorchFacts:
    """What torch was built for (`cuda` None: the CPU only), each GPU it can use, its name and bytes of memory, and what
    stands below it (None: not there).
    """

    version: str
    cuda: str | None
    num_threads: int
    gpus: tuple[tuple[str, int], ...]
    driver: str | None = None
    cudnn: int | None = None
    triton: str | None = None
    compiler: str | None = None


def torch_facts() -> TorchFacts:
    if torch.cuda.is_available():
        torch.cuda.init()  # before that torch counts cards, although it can use one slice where one is cut by MIG
    num_gpus = torch.cuda.device_count() if torch.cuda.is_initialized() else 0
    gpus = map(torch.cuda.get_device_properties, range(num_gpus))
    return TorchFacts(
        version=torch.__version__,
        cuda=torch.version.cuda,
        num_threads=torch.get_num_threads(),
        gpus=tuple((gpu.name, gpu.total_memory) for gpu in gpus),
        driver=_driver_version(),
        cudnn=torch.backends.cudnn.version(),
        triton=_version_of("triton"),
        # As triton looks for one.
        compiler=os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"),
    )


def _driver_version() -> str | None:
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"\d+\.\d[\d.]*", text)
    return found and found[0]


def _version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
