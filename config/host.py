"""What this host has for a process, as its control group bounds it, and a worker's share of cores and memory."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/")

# Pixels take up to twice what is allowed for them: once decoded, once as the model's inputs.
_SHARE_FOR_PIXELS = 1 / 8
_MOST_FOR_PIXELS = 4 * 2**30


def num_cores(root: Path = _ROOT) -> int:
    """Those that this process may use, by its affinity and by its group's quota, rounded up."""
    # Some systems do not tell which.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [text.split() for text in _told_by_groups(root, "cpu", "cpu.max")]
    return min([cores, *(math.ceil(int(quota) / int(period)) for quota, period in quotas if quota != "max")])


def memory_bytes(root: Path = _ROOT) -> int:
    """The machine's memory, or what the group may take of it."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [
        *_told_by_groups(root, "memory", "memory.max"),
        *_told_by_groups(root, "memory", "memory.limit_in_bytes"),
    ]
    return min([memory, *(int(limit) for limit in limits if limit != "max")])


def thread_limits(root: Path = _ROOT) -> dict[str, int]:
    """How many threads of all processes there may be, by the name of what bounds them."""
    kernel = {name: root / "proc/sys/kernel" / name for name in ("threads-max", "pid_max")}
    limits = {f"kernel.{name}": int(file.read_text()) for name, file in kernel.items() if file.is_file()}
    groups = [int(limit) for limit in _told_by_groups(root, "pids", "pids.max") if limit != "max"]
    return limits | ({"pids.max of the control group": min(groups)} if groups else {})


def share_of_cores(num_workers: int) -> int:
    """A worker's, where so many are on this host."""
    return max(1, num_cores() // num_workers)


def share_of_memory(num_workers: int) -> int:
    """Bytes that a worker may take for pixels, where so many are on this host."""
    if not hasattr(os, "sysconf"):  # no worker runs there, but its settings may be looked at
        return _MOST_FOR_PIXELS
    return min(_MOST_FOR_PIXELS, max(2**20, int(_SHARE_FOR_PIXELS * memory_bytes()) // num_workers))


def _told_by_groups(root: Path, controller: str, name: str) -> Iterator[str]:
    """What the file of this name says of the process' control group and of those above it, in both versions of them."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / (controller if controllers else "")
        own = mount / path.strip("/")
        # A container is told its path on the host, and shown its own group as the uppermost.
        for group in (own, *(above for above in own.parents if above.is_relative_to(mount))):
            if (file := group / name).is_file():
                yield file.read_text().strip()
