"""Which GPUs get a worker each, found without CUDA: a parent that touched it would spoil its children's pinning."""

import subprocess
from collections.abc import Mapping

from keye.config.hardware import DeviceSetting


def visible_gpus(device: DeviceSetting, environ: Mapping[str, str]) -> list[str]:
    """Values for the children's CUDA_VISIBLE_DEVICES, one a child; empty means one child on the CPU.

    An operator's own CUDA_VISIBLE_DEVICES is taken at its word; without one, every GPU that nvidia-smi lists.
    """
    if device == "cpu":
        return []
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return _listed_by_driver()
    # As CUDA reads it: a negative index ends the list.
    gpus = [gpu.strip() for gpu in chosen.split(",") if gpu.strip()]
    return gpus[: next((i for i, gpu in enumerate(gpus) if gpu.startswith("-")), len(gpus))]


def _listed_by_driver() -> list[str]:
    """UUIDs, which stay true when a container or a reboot numbers the cards anew."""
    try:
        answer = subprocess.run(
            ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"], capture_output=True, text=True, timeout=30
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return []
    return answer.stdout.split() if answer.returncode == 0 else []
