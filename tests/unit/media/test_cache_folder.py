"""Whatever happens to the cache's folder, and whatever lies in it, a job has its medium and hears nothing of it."""

import logging
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest

from keye.worker.media.fetch.media_cache import MediaCache
from tests.support.conditions import eventually

CLIP = random.Random(1).randbytes(2**20)
HALF = len(CLIP) // 2


class Store:
    """Counts what is downloaded, and does something at half of it."""

    def __init__(self) -> None:
        self.num_asked = 0
        self.meanwhile: Callable[[], object] = lambda: None

    def __call__(self, handle: int) -> None:
        self.num_asked += 1
        os.pwrite(handle, CLIP[:HALF], 0)
        self.meanwhile()
        os.pwrite(handle, CLIP[HALF:], HALF)


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def cache(folder: Path) -> MediaCache:
    return MediaCache(folder, 10 * len(CLIP))


def read(cache: MediaCache, store: Callable[[int], None], name: str = "clip") -> bytes:
    with cache.open((name,), len(CLIP), store) as file:
        return file.read()


def delete(folder: Path, *parts: str) -> None:
    for part in parts:
        if part == "ledger":
            (folder / part).unlink()
        else:
            shutil.rmtree(folder / part)


def replace_by_empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir(mode=0o700)


HAPPENS: dict[str, Callable[[Path], object]] = {
    "deleted": shutil.rmtree,
    "replaced by an empty one": replace_by_empty,
    "moved": lambda folder: folder.rename(folder.parent / f"moved-{time.monotonic_ns()}"),
    "whole media deleted": lambda folder: delete(folder, "whole"),
    "partial ones deleted": lambda folder: delete(folder, "partial"),
    "digests deleted": lambda folder: delete(folder, "digest"),
    "ledger deleted": lambda folder: delete(folder, "ledger"),
    "all within deleted": lambda folder: delete(folder, "whole", "partial", "digest", "ledger"),
}


@pytest.mark.parametrize("happens", HAPPENS)
def test_folder_that_is_deleted_before_or_during_a_download_is_made_again(
    cache: MediaCache, store: Store, folder: Path, happens: str
) -> None:
    read(cache, store, "another")
    HAPPENS[happens](folder)
    assert read(cache, store) == CLIP
    store.meanwhile = lambda: HAPPENS[happens](folder)
    assert read(cache, store, "third") == CLIP
    store.meanwhile = lambda: None
    assert {read(cache, store, name) for name in ("clip", "third", "another")} == {CLIP}
    store.num_asked = 0
    assert {read(cache, store, name) for name in ("clip", "third", "another")} == {CLIP}
    assert store.num_asked == 0
    read(cache, store, "fourth")
    assert cache.num_bytes >= 4 * len(CLIP)
    assert list(folder.glob("partial/*")) == []
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("happens", HAPPENS)
def test_who_waits_for_a_download_that_is_deleted_has_its_medium(
    cache: MediaCache, store: Store, folder: Path, happens: str
) -> None:
    has_begun, waits = Event(), Event()

    def delete_it() -> None:
        has_begun.set()
        assert waits.wait(30)
        HAPPENS[happens](folder)

    def look_on() -> None:
        waits.set()

    store.meanwhile = delete_it
    second = Store()
    with ThreadPoolExecutor() as jobs:
        first_job = jobs.submit(read, cache, store)
        assert has_begun.wait(30)
        second_job = jobs.submit(lambda: cache.open(("clip",), len(CLIP), second, look_on))
        assert first_job.result(30) == CLIP
        with second_job.result(30) as file:
            assert file.read() == CLIP
    assert store.num_asked == 1
    assert read(cache, Store()) == CLIP


def test_failed_download_in_a_deleted_folder_says_what_failed(cache: MediaCache, store: Store, folder: Path) -> None:
    def fail() -> None:
        shutil.rmtree(folder)
        raise InterruptedError("cancelled")

    store.meanwhile = fail
    with pytest.raises(InterruptedError, match="cancelled"):
        read(cache, store)
    with pytest.raises(InterruptedError, match="cancelled"):
        cache.open_unkept(store, len(CLIP))


READER = """
import hashlib, os, random, sys
from pathlib import Path
from keye.worker.media.fetch.media_cache import MediaCache

cache = MediaCache(Path(sys.argv[1]), 8 * 2**16)
chosen = random.Random(sys.argv[2])
for _ in range(150):
    name = str(chosen.randrange(12))
    content = random.Random(name).randbytes(2**16)
    with cache.open((name,), 2**16, lambda handle: os.pwrite(handle, content, 0)) as file:
        assert file.read() == content, name
"""


def test_processes_read_on_while_somebody_deletes_everything(folder: Path) -> None:
    readers = [subprocess.Popen([sys.executable, "-c", READER, folder, str(number)]) for number in range(2)]
    parts = ["deleted", "whole", "partial", "ledger", "digest"]
    chosen = random.Random(3)
    while any(reader.poll() is None for reader in readers):
        part = chosen.choice(parts)
        if part in HAPPENS:
            shutil.rmtree(folder, ignore_errors=True)
        elif part == "ledger":
            (folder / part).unlink(missing_ok=True)
        else:
            shutil.rmtree(folder / part, ignore_errors=True)
        time.sleep(0.01)
    assert [reader.returncode for reader in readers] == [0, 0]


def test_folder_that_cannot_be_made_again_is_the_hosts_fault(cache: MediaCache, store: Store, folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_bytes(b"")
    with pytest.raises(FileExistsError):
        read(cache, store)
    with pytest.raises(FileExistsError):
        cache.open_unkept(store)
    with pytest.raises(FileExistsError):
        cache.prove()
    folder.unlink()
    assert read(cache, store) == CLIP


def test_folder_that_another_user_has_made_again_is_not_used(cache: MediaCache, store: Store, folder: Path) -> None:
    if os.geteuid():
        pytest.skip("only root may make another's folder")
    shutil.rmtree(folder)
    folder.mkdir(mode=0o777)
    os.chown(folder, 4321, 4321)
    with pytest.raises(PermissionError, match="belongs to another user"):
        read(cache, store)


GARBAGE = {
    "empty": b"",
    "text": b"my own accounts\n",
    "negative": b"%020d" % -5,
    "huge": b"9" * 20,
    "nothing but zeros": bytes(20),
    "longer": b"%020d and more" % 5,
    "not decimal": "٣".encode() * 10,
}


@pytest.mark.parametrize("content", GARBAGE.values(), ids=GARBAGE)
def test_ledger_that_makes_no_sense_is_counted_anew(
    cache: MediaCache, store: Store, folder: Path, content: bytes
) -> None:
    read(cache, store, "another")
    (folder / "ledger").write_bytes(content)
    assert cache.num_bytes == 0
    assert read(cache, store) == CLIP
    assert cache.num_bytes == MediaCache(folder, 10 * len(CLIP)).num_bytes == 2 * len(CLIP)


def put_folder(path: Path) -> None:
    (path / "of" / "others").mkdir(parents=True)


def put_socket(path: Path) -> None:
    handle = os.open(path.parent, os.O_PATH)
    with socket.socket(socket.AF_UNIX) as server:
        # A short name for it.
        server.bind(f"/proc/self/fd/{handle}/{path.name}")
    os.close(handle)


def put_link(path: Path) -> None:
    outside = next(folder for folder in path.parents if folder.name == "cache").parent / "precious"
    outside.write_bytes(b"precious")
    path.symlink_to(outside)


PUT: dict[str, Callable[[Path], object]] = {
    "a folder": put_folder,
    "a pipe": os.mkfifo,
    "a socket": put_socket,
    "a link": put_link,
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("put", PUT)
@pytest.mark.parametrize("place", ["ledger", "whole/{}", "partial/{}", "digest/{}", "whole", "partial", "digest"])
def test_what_lies_in_a_files_place_and_is_none_makes_way(
    cache: MediaCache, store: Store, folder: Path, caplog: pytest.LogCaptureFixture, place: str, put: str
) -> None:
    if place in ("whole", "partial", "digest") and put == "a folder":
        pytest.skip("that is what it is")
    caplog.set_level(logging.INFO)
    read(cache, store)
    (path,) = folder.glob("whole/*")
    there = folder / place.format(path.name)
    if there.is_dir():
        shutil.rmtree(there)
    else:
        there.unlink(missing_ok=True)
    if place.startswith("partial/"):
        path.unlink()
    PUT[put](there)
    assert cache.num_bytes >= 0
    for number in range(3):
        assert read(cache, store, ["clip", "another", "clip"][number]) == CLIP
    cache.open_unkept(store).close()
    cache.prove()
    # All that makes room passes over it too.
    MediaCache(folder, 2 * len(CLIP))
    assert read(cache, store, "third") == CLIP
    if put == "a link":
        assert (folder.parent / "precious").read_bytes() == b"precious"
    assert len(caplog.messages) <= 1


@pytest.mark.parametrize("put", PUT)
def test_what_lies_beside_the_media_is_passed_over(
    cache: MediaCache, store: Store, folder: Path, caplog: pytest.LogCaptureFixture, put: str
) -> None:
    for place in ("whole", "partial"):
        PUT[put](folder / place / ("f" * 64))
    small = MediaCache(folder, len(CLIP))
    for name in ("clip", "another", "clip"):
        assert read(small, store, name) == CLIP
    assert small.num_bytes == len(CLIP)
    cache.prove()
    assert os.path.lexists(folder / "whole" / ("f" * 64))
    assert caplog.messages == []


def damage_by(what: str, path: Path) -> None:
    match what:
        case "cut off":
            os.truncate(path, HALF)
        case "emptied":
            os.truncate(path, 0)
        case "longer":
            os.truncate(path, len(CLIP) + 1)
        case "a byte of it altered":
            with path.open("r+b") as file:
                file.seek(HALF)
                file.write(bytes([CLIP[HALF] ^ 1]))
        case "zeros":
            path.write_bytes(bytes(len(CLIP)))
        case "replaced":
            path.unlink()
            path.write_bytes(CLIP[::-1])


@pytest.mark.holds(
    "docs/operations.md#what-lies-in-the-cache-folder-and-may-i-delete-it",
    "held against its size and its SHA-256",
    "fetched again where it was cut off or altered",
)
@pytest.mark.parametrize("is_started_anew", [True, False])
@pytest.mark.parametrize("what", ["cut off", "emptied", "longer", "a byte of it altered", "zeros", "replaced"])
def test_file_that_is_not_what_was_downloaded_is_downloaded_again(
    cache: MediaCache, store: Store, folder: Path, caplog: pytest.LogCaptureFixture, what: str, is_started_anew: bool
) -> None:
    assert read(cache, store) == read(cache, store) == CLIP
    (path,) = folder.glob("whole/*")
    damage_by(what, path)
    if is_started_anew:
        cache = MediaCache(folder, 10 * len(CLIP))
    for _ in range(2):
        assert read(cache, store) == CLIP
    assert store.num_asked == 2
    assert [line for line in caplog.messages if "was cut off or altered" in line] == caplog.messages
    assert len(caplog.messages) == 1
    assert cache.num_bytes >= len(CLIP)


@pytest.mark.holds(
    "docs/operations.md#what-lies-in-the-cache-folder-and-may-i-delete-it",
    "before a process uses it for the first time",
)
def test_medium_is_read_once_in_a_process_whoever_else_uses_it(
    cache: MediaCache, store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen by what the process reads of the disk: nothing of the medium, once it is known."""
    read(cache, store)
    other = MediaCache(folder, 10 * len(CLIP))
    cache.open(("clip",), len(CLIP), store).close()
    num_read = []
    for reader in (other, other, cache, other):
        before = num_bytes_read()
        reader.open(("clip",), len(CLIP), store).close()
        num_read.append(num_bytes_read() - before >= len(CLIP))
    assert num_read == [True, False, False, False]
    assert store.num_asked == 1


def num_bytes_read() -> int:
    """By system calls of this process, whether or not they reached the disk."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


def test_who_is_over_does_not_wait_until_a_file_is_read(cache: MediaCache, store: Store, folder: Path) -> None:
    read(cache, store)

    def cancel() -> None:
        raise InterruptedError("cancelled")

    with pytest.raises(InterruptedError, match="cancelled"):
        MediaCache(folder, 10 * len(CLIP)).open(("clip",), len(CLIP), store, cancel)
    assert read(cache, store) == CLIP
    assert store.num_asked == 1


def test_files_are_closed_however_it_ends(cache: MediaCache, store: Store, folder: Path) -> None:
    def num_open() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = num_open()
    read(cache, store)
    (path,) = folder.glob("whole/*")
    for what in ("cut off", "replaced"):
        damage_by(what, path)
        read(cache, store)
    store.meanwhile = lambda: shutil.rmtree(folder)
    read(cache, store, "deleted")
    store.meanwhile = lambda: 1 / 0
    for fail in (lambda: read(cache, store, "failed"), lambda: cache.open_unkept(store)):
        with pytest.raises(ZeroDivisionError):
            fail()
    eventually(lambda: num_open() == before)
