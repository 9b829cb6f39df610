"""On a disk that is full the cache gives up what it keeps before any job hears of it."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from keye.worker.media.fetch.media_cache import MediaCache
from tests.support.mounts import mounted

MIB = 2**20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Eight MiB, of which others take nothing yet."""
    with mounted(tmp_path / "disk", 8 * MIB):
        yield tmp_path / "disk"


class Store:
    """Counts how often a medium of so many MiB is downloaded from it."""

    def __init__(self) -> None:
        self.num_asked = 0

    def download(self, num_mib: int) -> Callable[[int], None]:
        def write(handle: int) -> None:
            self.num_asked += 1
            os.lseek(handle, 0, os.SEEK_SET)
            with open(handle, "wb", closefd=False) as file:
                for _ in range(num_mib):
                    file.write(b"x" * MIB)

        return write

    def read(self, cache: MediaCache, name: str, num_mib: int) -> None:
        with cache.open((name,), num_mib * MIB, self.download(num_mib)) as file:
            assert os.fstat(file.fileno()).st_size == num_mib * MIB


@pytest.fixture
def store() -> Store:
    return Store()


def num_bytes_free(disk: Path) -> int:
    found = os.statvfs(disk)
    return found.f_bavail * found.f_frsize


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def is_full() -> "pytest.RaisesExc[OSError]":
    return pytest.raises(OSError, check=lambda fault: fault.errno == errno.ENOSPC)


@pytest.mark.holds(
    "docs/operations.md#what-lies-in-the-cache-folder-and-may-i-delete-it",
    "Where the disk is full, the cache gives up what it keeps: as much as is needed, then all.",
)
@pytest.mark.holds(
    "docs/operations.md#a-worker-says-that-it-is-sick-what-must-i-do",
    "A full disk is met with the cache's own files first.",
)
def test_as_many_are_given_up_as_take_what_is_needed_the_eldest_first(disk: Path, store: Store) -> None:
    cache = MediaCache(disk / "cache", 100 * MIB)
    for name in ("first", "second", "third"):
        store.read(cache, name, 2)
    store.read(cache, "fourth", 3)
    store.num_asked = 0
    for name, num_mib in (("third", 2), ("fourth", 3)):
        store.read(cache, name, num_mib)
    assert store.num_asked == 0
    store.read(cache, "fifth", 7)
    assert store.num_asked == 1, "what does not fit is known before it is downloaded"
    assert len(names(disk / "cache" / "whole")) == 1
    assert cache.num_bytes == 7 * MIB


def test_disk_that_others_have_filled_is_known_before_a_download(disk: Path, store: Store) -> None:
    cache = MediaCache(disk / "cache", 100 * MIB)
    store.read(cache, "kept", 1)
    filler = disk / "filler"
    filler.write_bytes(bytes(5 * MIB))
    with is_full():
        store.read(cache, "too large", 4)
    store.read(cache, "kept", 1)
    assert store.num_asked == 1, "nor is anything given up in vain"
    assert names(disk / "cache" / "partial") == set()
    assert cache.num_bytes == MIB
    filler.unlink()
    store.read(cache, "too large", 4)
    assert cache.num_bytes == 5 * MIB
    with is_full():
        store.read(cache, "larger than the disk", 9)
    assert cache.num_bytes == 5 * MIB


@pytest.mark.parametrize("num_bytes", [6 * MIB, 0], ids=["of known size", "of unknown size"])
def test_what_is_not_kept_has_room_made_for_it_too(disk: Path, store: Store, num_bytes: int) -> None:
    cache = MediaCache(disk / "cache", 100 * MIB)
    for name in ("first", "second"):
        store.read(cache, name, 2)
    with cache.open_unkept(store.download(6), num_bytes) as file:
        assert os.fstat(file.fileno()).st_size == 6 * MIB
    store.num_asked = 0
    with is_full():
        cache.open_unkept(store.download(9), num_bytes and 9 * MIB)
    assert num_bytes_free(disk) > 7 * MIB
    assert store.num_asked == (0 if num_bytes else 2), "once more, since others may have given up something"


def test_dead_workers_download_makes_room(disk: Path, store: Store) -> None:
    cache = MediaCache(disk / "cache", 100 * MIB)
    (disk / "cache" / "partial" / ("0" * 64)).write_bytes(bytes(6 * MIB))
    store.read(cache, "clip", 6)
    assert names(disk / "cache" / "partial") == set()


def test_proof_takes_a_medium_of_usual_size_gives_up_what_is_kept_and_leaves_nothing(disk: Path, store: Store) -> None:
    cache = MediaCache(disk / "cache", 100 * MIB)
    cache.prove()
    store.read(cache, "kept", 2)
    filler = disk / "filler"
    filler.write_bytes(bytes(num_bytes_free(disk) - 4096))
    cache.prove()
    assert names(disk / "cache" / "whole") == set()
    with filler.open("ab") as file:
        file.write(bytes(num_bytes_free(disk) - 4096))
    with is_full():
        cache.prove()
    filler.unlink()
    cache.prove()
    assert num_bytes_free(disk) > 7.9 * MIB


def test_worker_starts_on_a_full_disk_and_gives_up_what_it_kept(disk: Path, store: Store) -> None:
    store.read(MediaCache(disk / "cache", 100 * MIB), "kept", 2)
    (disk / "cache" / "ledger").unlink()
    (disk / "filler").write_bytes(bytes(num_bytes_free(disk)))
    store.read(MediaCache(disk / "cache", 100 * MIB), "clip", 1)


READER = """
import os, sys
from pathlib import Path
from keye.worker.media.fetch.media_cache import MediaCache

cache = MediaCache(Path(sys.argv[1]), 2**30)
for number in range(60):
    name = str((int(sys.argv[2]) * 7 + number) % 20)
    with cache.open((name,), 2**20, lambda handle: os.pwrite(handle, name.encode() * 2**18, 0)) as file:
        assert file.read(2) == (name * 2)[:2].encode()
"""


def test_processes_that_share_a_full_disk_each_get_their_media(disk: Path) -> None:
    """Twenty media of one MiB each, three at a time, on eight MiB."""
    readers = [subprocess.Popen([sys.executable, "-c", READER, disk / "cache", str(number)]) for number in range(3)]
    assert [reader.wait(60) for reader in readers] == [0, 0, 0]
    cache = MediaCache(disk / "cache", 2**30)
    assert names(disk / "cache" / "partial") == set()
    assert cache.num_bytes == MIB * len(names(disk / "cache" / "whole"))
