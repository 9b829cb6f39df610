"""What a host has, as the files of a pretended one tell it, and how its workers divide it."""

import os
from pathlib import Path

import pytest

from keye.config import host
from keye.config.settings import Settings


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def test_a_host_without_bounds_has_all_its_memory_and_cores(tmp_path: Path) -> None:
    write(tmp_path, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": "max", "sys/fs/cgroup/cpu.max": "max 1"})
    assert host.memory_bytes(tmp_path) == host.memory_bytes(tmp_path / "none") > 2**28
    assert host.num_cores(tmp_path) == len(os.sched_getaffinity(0))


@pytest.mark.holds(
    "docs/operations.md#what-can-a-broken-or-hostile-file-do",
    "Cores and memory are those of the control group (a container's limits).",
)
@pytest.mark.parametrize(
    "files",
    [
        {
            "proc/self/cgroup": "0::/a/b",
            "sys/fs/cgroup/a/memory.max": str(2**27),
            "sys/fs/cgroup/a/b/memory.max": "max",
        },
        {"proc/self/cgroup": "0::/on/the/host", "sys/fs/cgroup/memory.max": str(2**27)},
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/c\n4:memory:/c",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": str(2**63 - 4096),
            "sys/fs/cgroup/memory/c/memory.limit_in_bytes": str(2**27),
        },
    ],
    ids=["group above", "container", "version 1"],
)
def test_the_smallest_memory_of_the_groups_counts(tmp_path: Path, files: dict[str, str]) -> None:
    assert host.memory_bytes(write(tmp_path, files)) == 2**27


@pytest.mark.holds(
    "docs/operations.md#what-can-a-broken-or-hostile-file-do",
    "Cores and memory are those of the control group",
)
def test_a_quota_of_half_a_core_is_one(tmp_path: Path) -> None:
    write(tmp_path, {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "50000 100000"})
    assert host.num_cores(tmp_path) == 1


@pytest.mark.parametrize(
    "files",
    [
        {
            "proc/self/cgroup": "0::/a/b",
            "sys/fs/cgroup/a/pids.max": "100",
            "sys/fs/cgroup/a/b/pids.max": "max",
        },
        {"proc/self/cgroup": "3:pids:/c", "sys/fs/cgroup/pids/c/pids.max": "100"},
    ],
    ids=["group above", "version 1"],
)
def test_threads_are_bounded_by_the_kernel_and_by_groups(tmp_path: Path, files: dict[str, str]) -> None:
    write(tmp_path, files | {"proc/sys/kernel/threads-max": "9000", "proc/sys/kernel/pid_max": "8000"})
    told = {"kernel.threads-max": 9000, "kernel.pid_max": 8000, "pids.max of the control group": 100}
    assert host.thread_limits(tmp_path) == told


@pytest.mark.holds("docs/operations.md#what-can-a-broken-or-hostile-file-do", "The workers of one host divide it")
def test_workers_of_a_host_divide_its_cores_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "num_cores", lambda: 24)
    monkeypatch.setattr(host, "memory_bytes", lambda: 64 * 2**30)
    decoders = [Settings(host_workers=number).decoders for number in (1, 2, 8, 25)]
    pixels = [Settings(host_workers=number).max_decoded_bytes / 2**30 for number in (1, 2, 8)]
    assert decoders == [8, 8, 3, 1]
    assert pixels == [4, 4, 1]


@pytest.mark.holds("docs/operations.md#what-can-a-broken-or-hostile-file-do", "What is set stands for each worker.")
def test_what_is_set_stands_for_each_worker() -> None:
    settings = Settings(host_workers=8, decoders=12, max_decoded_bytes=2**40)
    assert (settings.decoders, settings.max_decoded_bytes) == (12, 2**40)
