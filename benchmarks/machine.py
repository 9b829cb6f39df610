"""What the figures were measured on, and how much memory a process held."""

import datetime
import os
import platform
from importlib.metadata import version
from pathlib import Path


def describe_machine() -> str:
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{datetime.date.today()}, {cpu}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB, "
        f"Python {platform.python_version()}, torch {version('torch')}, transformers {version('transformers')}"
    )


def peak_bytes() -> int:
    """The most memory that this process held."""
    # Not getrusage: it tells what the parent of this process held.
    (line,) = (row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmHWM"))
    return 1024 * int(line.split()[1])
