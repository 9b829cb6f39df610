"""What is done side by side ends in order, also where the host starts no more threads."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from pathlib import Path

import pytest

from keye.config.job import ImagePart
from keye.config.settings import Settings
from keye.worker.host_fault import host_fault_of
from keye.worker.media.job_media import MediaCache, MediaLimits, fetch
from keye.worker.media.side_by_side import do_side_by_side


@contextmanager
def no_more_threads() -> Iterator[None]:
    """By a stack that no machine has room for."""
    before = threading.stack_size(2**46)
    try:
        yield
    finally:
        threading.stack_size(before)


def test_without_threads_all_ends_at_once_as_the_hosts_fault() -> None:
    left: list[Future[int]] = []

    def leave(futures: Sequence[Future[int]]) -> None:
        left.extend(futures)
        wait(futures)

    with no_more_threads(), pytest.raises(RuntimeError) as caught:
        do_side_by_side([lambda _: 1, lambda _: 2], 2, lambda: None, leave)
    assert "No more threads can be started" in str(host_fault_of(caught.value))
    assert [future.done() for future in left] == [True, True]
    assert do_side_by_side([lambda _: 1, lambda _: 2], 2, lambda: None, leave) == [1, 2]


def test_media_of_a_job_without_threads_leave_no_file_open(tmp_path: Path) -> None:
    (tmp_path / "cat.jpg").write_bytes(b"content")
    limits, cache = MediaLimits.of(Settings(media_roots=(tmp_path,))), MediaCache(tmp_path / "cache", 0)
    before = os.listdir("/proc/self/fd")
    with no_more_threads(), pytest.raises(RuntimeError):
        fetch([ImagePart(uri=f"{tmp_path}/cat.jpg")] * 3, limits, cache)
    assert os.listdir("/proc/self/fd") == before


# Its address space has room for the stack of one more thread.
FEW_THREADS = """
import resource, threading
from pathlib import Path
from keye.worker.media.side_by_side import do_side_by_side

def call(number):
    def name(go_on):
        go_on()
        threads.add(threading.get_ident())
        return number
    return name

threads = set()
taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
threading.stack_size(2**30)
resource.setrlimit(resource.RLIMIT_AS, (taken + 2**30 + 2**29, resource.RLIM_INFINITY))
print(do_side_by_side([call(number) for number in range(8)], 8, lambda: None, lambda _: None), len(threads))
"""


def test_with_fewer_threads_it_goes_on() -> None:
    ran = subprocess.run([sys.executable, "-c", FEW_THREADS], capture_output=True, text=True, check=True)
    assert ran.stdout == "[0, 1, 2, 3, 4, 5, 6, 7] 1\n"
