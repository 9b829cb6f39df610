"""Media are downloaded once and kept within a size, by threads and processes that share a folder and may be killed."""

import fcntl
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Event, Lock

import pytest

from keye.worker.media.fetch.media_cache import MediaCache


class Origin:
    """Where media come from: counts the downloads of each, and may be told to break."""

    def __init__(self) -> None:
        self.downloads: list[str] = []
        self._counting = Lock()

    def download(self, name: str, num_bytes: int) -> Callable[[int], None]:
        def write(handle: int) -> None:
            with self._counting:
                self.downloads.append(name)
            os.pwrite(handle, content_of(name, num_bytes), 0)

        return write

    def read(self, cache: MediaCache, name: str, num_bytes: int = 100) -> bytes:
        with cache.open((name,), num_bytes, self.download(name, num_bytes)) as file:
            return file.read()


def content_of(name: str, num_bytes: int) -> bytes:
    return random.Random(name).randbytes(num_bytes)


def num_bytes_in(folder: Path) -> int:
    """What the cache takes at one moment: while its ledger is locked, files are only moved."""
    size_of: dict[int, int] = {}
    with (folder / "ledger").open("rb") as ledger:
        fcntl.flock(ledger, fcntl.LOCK_EX)
        for path in (*folder.glob("partial/*"), *folder.glob("whole/*")):
            with suppress(FileNotFoundError):
                found = path.stat()
                size_of[found.st_ino] = found.st_size
    return sum(size_of.values())


@pytest.fixture
def origin() -> Origin:
    return Origin()


def test_ten_questions_about_one_clip_download_it_once(origin: Origin, tmp_path: Path) -> None:
    cache = MediaCache(tmp_path, 1000)
    assert {origin.read(cache, "clip") for _ in range(10)} == {content_of("clip", 100)}
    assert origin.downloads == ["clip"]
    # Another worker, or this one after a restart.
    assert origin.read(MediaCache(tmp_path, 1000), "clip") == content_of("clip", 100)
    assert origin.downloads == ["clip"]


@pytest.mark.holds(
    "docs/operations.md#what-lies-in-the-cache-folder-and-may-i-delete-it",
    "a medium that several of them want is downloaded once",
)
def test_jobs_that_want_a_clip_at_once_share_its_download(origin: Origin, tmp_path: Path) -> None:
    caches = [MediaCache(tmp_path, 1000), MediaCache(tmp_path, 1000)]
    all_wait, begun = Event(), Event()

    def slow_download(handle: int) -> None:
        begun.set()
        assert all_wait.wait(10)
        origin.download("clip", 100)(handle)

    def read(position: int) -> bytes:
        with caches[position % 2].open(("clip",), 100, slow_download) as file:
            return file.read()

    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(read, position) for position in range(8)]
        assert begun.wait(10)
        all_wait.set()
        assert {answer.result(10) for answer in answers} == {content_of("clip", 100)}
    assert origin.downloads == ["clip"]


def test_a_clip_finished_by_another_just_before_the_lock_is_not_downloaded_again(
    origin: Origin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other's download ends after this cache looked for the clip and before it takes the clip's lock."""
    cache, other = MediaCache(tmp_path, 1000), MediaCache(tmp_path, 1000)
    monkeypatch.setattr(cache, "_make_folders", lambda: origin.read(other, "clip"))
    origin.read(cache, "clip")
    assert origin.downloads == ["clip"]
    assert list((tmp_path / "partial").iterdir()) == []


@pytest.mark.holds(
    "docs/operations.md#what-lies-in-the-cache-folder-and-may-i-delete-it",
    "the least recently used going first when `KEYE_CACHE_BYTES` is reached",
)
def test_least_recently_used_go_first(origin: Origin, tmp_path: Path) -> None:
    cache = MediaCache(tmp_path, 1000)
    for number in range(10):
        origin.read(cache, f"clip {number}")
        for path in (tmp_path / "whole").iterdir():
            age(path)
    origin.read(cache, "clip 0")
    origin.read(cache, "new")
    origin.downloads.clear()
    origin.read(cache, "clip 0")
    assert origin.downloads == []
    origin.read(cache, "clip 1")
    assert origin.downloads == ["clip 1"]


def age(path: Path) -> None:
    """Files of one test are made within a tick of the clock."""
    found = path.stat()
    os.utime(path, ns=(found.st_atime_ns - 10**9, found.st_mtime_ns - 10**9))


@pytest.mark.holds(
    "docs/operations.md#what-lies-in-the-cache-folder-and-may-i-delete-it",
    "when `KEYE_CACHE_BYTES` is reached",
)
def test_size_is_never_exceeded_however_many_download_at_once(origin: Origin, tmp_path: Path) -> None:
    caches = [MediaCache(tmp_path, 10_000) for _ in range(3)]
    dice = random.Random(7)
    wishes = [(f"clip {dice.randrange(60)}", cache) for cache in caches for _ in range(200)]
    dice.shuffle(wishes)
    ended = Event()

    def read(name: str, cache: MediaCache) -> None:
        num_bytes = 100 * int(name.split()[1]) + 1
        assert origin.read(cache, name, num_bytes) == content_of(name, num_bytes)

    def watch() -> int:
        largest = 0
        # With rests, or on a busy machine nobody else would have a turn at Python's lock.
        while not ended.wait(0.001):
            largest = max(largest, num_bytes_in(tmp_path))
        return largest

    with ThreadPoolExecutor(9) as pool:
        watched = pool.submit(watch)
        try:
            for answer in [pool.submit(read, *wish) for wish in wishes]:
                answer.result(30)
        finally:
            ended.set()
    assert 5_000 < watched.result() <= 10_000
    assert not list((tmp_path / "partial").iterdir())
    assert len(origin.downloads) < len(wishes)


@pytest.mark.holds(
    "docs/operations.md#what-lies-in-the-cache-folder-and-may-i-delete-it",
    "A medium that is larger than the cache is downloaded, used and not kept.",
)
def test_what_is_larger_than_the_cache_is_read_and_not_kept(origin: Origin, tmp_path: Path) -> None:
    for cache in (MediaCache(tmp_path, 99), MediaCache(tmp_path, 0)):
        assert origin.read(cache, "clip") == content_of("clip", 100)
        assert num_bytes_in(tmp_path) == 0


@pytest.mark.holds(
    "docs/operations.md#what-lies-in-the-cache-folder-and-may-i-delete-it",
    "running jobs keep what they have open",
)
def test_open_medium_stays_whole_when_it_is_removed_from_the_cache(origin: Origin, tmp_path: Path) -> None:
    cache = MediaCache(tmp_path, 150)
    with cache.open(("first",), 100, origin.download("first", 100)) as file:
        origin.read(cache, "second")
        assert num_bytes_in(tmp_path) == 100
        assert file.read() == content_of("first", 100)


def test_failed_download_leaves_nothing_and_the_next_tries_again(origin: Origin, tmp_path: Path) -> None:
    def break_off(handle: int) -> None:
        os.pwrite(handle, b"half", 0)
        raise ConnectionError("the far end went away")

    cache = MediaCache(tmp_path, 100)
    for _ in range(3):
        with pytest.raises(ConnectionError):
            cache.open(("clip",), 100, break_off)
        assert num_bytes_in(tmp_path) == 0
    assert origin.read(cache, "clip") == content_of("clip", 100)
    assert num_bytes_in(tmp_path) == 100


def test_decoders_get_a_handle_that_cannot_change_what_is_kept(origin: Origin, tmp_path: Path) -> None:
    cache = MediaCache(tmp_path, 100)
    for _ in range(2):
        with cache.open(("clip",), 100, origin.download("clip", 100)) as file, pytest.raises(OSError, match="Bad file"):
            os.pwrite(file.fileno(), b"changed", 0)


def test_smaller_limit_holds_from_the_start(origin: Origin, tmp_path: Path) -> None:
    cache = MediaCache(tmp_path, 1000)
    for number in range(10):
        origin.read(cache, f"clip {number}")
    MediaCache(tmp_path, 300)
    assert num_bytes_in(tmp_path) == 300


KILLED = """
import os, sys
from pathlib import Path
from keye.worker.media.fetch.media_cache import MediaCache

def hang(handle):
    os.pwrite(handle, b"half", 0)
    print("downloading", flush=True)
    sys.stdin.read()

MediaCache(Path(sys.argv[1]), 150).open(("clip",), 100, hang)
"""


def test_download_of_a_killed_worker_is_forgotten_and_its_room_given_back(origin: Origin, tmp_path: Path) -> None:
    cache = MediaCache(tmp_path, 150)
    for name in ("clip", "other clip"):
        with subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as worker:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "downloading\n"
            worker.send_signal(signal.SIGKILL)
        # The same medium, then one that needs the room.
        assert origin.read(cache, name) == content_of(name, 100)
        assert num_bytes_in(tmp_path) <= 150
    assert not list((tmp_path / "partial").iterdir())


@pytest.mark.holds(
    "docs/operations.md#what-lies-in-the-cache-folder-and-may-i-delete-it",
    "Files, and the folder itself, can be deleted at any time",
)
def test_folders_that_were_tidied_away_are_made_again(origin: Origin, tmp_path: Path) -> None:
    cache = MediaCache(tmp_path, 150)
    for name in ("whole", "partial"):
        (tmp_path / name).rmdir()
    (tmp_path / "ledger").unlink()
    assert origin.read(cache, "clip") == content_of("clip", 100)
    assert num_bytes_in(tmp_path) == 100


def test_a_job_that_is_cancelled_does_not_wait_for_the_download_of_another(origin: Origin, tmp_path: Path) -> None:
    cache = MediaCache(tmp_path, 1000)
    has_begun, may_end = Event(), Event()

    def download_slowly(handle: int) -> None:
        has_begun.set()
        assert may_end.wait(timeout=30)
        os.pwrite(handle, content_of("clip", 100), 0)

    def cancel() -> None:
        raise InterruptedError("cancelled")

    with ThreadPoolExecutor() as other_job:
        first = other_job.submit(cache.open, ("clip",), 100, download_slowly)
        try:
            assert has_begun.wait(timeout=30)
            with pytest.raises(InterruptedError, match="cancelled"):
                cache.open(("clip",), 100, origin.download("clip", 100), cancel)
        finally:
            may_end.set()
        with first.result() as file:
            assert file.read() == content_of("clip", 100)
    assert origin.downloads == []
