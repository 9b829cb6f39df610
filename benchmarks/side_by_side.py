"""Readers of media compared: each in a process of its own, in turns, and what it took in time and memory."""

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.machine import peak_bytes

# From a path to what reads it: imports are done by the first call and measured by none.
Reader = Callable[[str], Callable[[], object]]

# Libraries that keep whole frames may take more than this, and would take the machine down.
MAX_ADDRESS_BYTES = 16 * 2**30


def compare(module: str, readers: Sequence[Reader], path: Path, rounds: int) -> Iterator[str]:
    """The lines of a table, medians of `rounds`; `module` ends with a call of `measure_alone`."""
    measured: dict[str, list[dict[str, float]]] = {reader.__name__: [] for reader in readers}
    missing: dict[str, str] = {}
    for _ in range(rounds):
        for name in [name for name in measured if name not in missing]:
            process = subprocess.run([sys.executable, "-m", module, name, path], capture_output=True, text=True)
            if process.returncode:
                missing[name] = f"{(process.stderr.strip() or 'killed').splitlines()[-1]:.60}"
            else:
                measured[name].append(json.loads(process.stdout.splitlines()[-1]))
    yield "| | CPU s | ratio | wall s | peak memory above import |"
    yield "|---|---|---|---|---|"
    base = None
    for name, results in measured.items():
        if name in missing:
            yield f"| {name.replace('_', ' ')} | not measured: {missing[name]} | | | |"
            continue
        cpu, wall, memory = (statistics.median(r[key] for r in results) for key in ("cpu", "wall", "memory"))
        base = base or cpu
        yield f"| {name.replace('_', ' ')} | {cpu:.1f} | {cpu / base:.2f} | {wall:.1f} | {memory / 2**20:.0f} MiB |"


def measure_alone(readers: Sequence[Reader], name: str, path: str) -> None:
    """Prints what the reader of that name takes, its child processes included."""
    read = next(reader for reader in readers if reader.__name__ == name)(path)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_ADDRESS_BYTES, resource.RLIM_INFINITY))
    before, wall, cpu = _peak_bytes(), time.perf_counter(), _cpu_seconds()
    read()
    wall, cpu, memory = time.perf_counter() - wall, _cpu_seconds() - cpu, _peak_bytes() - before
    print(json.dumps({"cpu": cpu, "wall": wall, "memory": memory}))


def _cpu_seconds() -> float:
    used = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def _peak_bytes() -> int:
    """The most this process held, and the most that one of its ended children did."""
    return peak_bytes() + 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
