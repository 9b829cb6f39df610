"""Fetched media kept on disk, shared by all workers of a host. What makes two media the same is for who fetches."""

import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from keye.worker.telemetry import metrics

# Room made at once: every eviction reads the whole folder.
_EVICTED_SHARE = 0.1

# How often who waits for another's download is asked whether to go on.
_TICK_SECONDS = 0.1

# More than any limit, so that the next to make room counts anew.
_UNKNOWN_BYTES = 2**62


class MediaCache:
    """At most `max_bytes` in `folder`, the least recently used go first. With 0 nothing is kept.

    Threads and processes share a folder and, by locks on its files that end with their holder, its downloads: a medium
    that several want at once is downloaded by one of them. `whole` holds complete media, moved there in one step;
    `partial` those under way, at full length from the start, so that they count; what a killed process leaves in it is
    removed by the next to make room. `ledger` holds the number of bytes promised to both, or more, never less.
    A medium that is open stays readable, and on the disk, when it is removed here.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """Raises `OSError` when the folder cannot be had, `PermissionError` when it belongs to another user."""
        self._whole = folder / "whole"
        self._partial = folder / "partial"
        self._ledger = folder / "ledger"
        self._max_bytes = max_bytes
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid != os.geteuid():
            raise PermissionError(f"{folder} belongs to another user. Set KEYE_CACHE_FOLDER to a folder of your own.")
        self._make_folders()
        with _locked(self._ledger) as ledger:
            _write_promised(ledger, self._evict(max_bytes))

    def open(
        self,
        identity: tuple[str, ...],
        num_bytes: int,
        download: Callable[[int], None],
        check: Callable[[], None] = lambda: None,
    ) -> BinaryIO:
        """The medium of this identity, from here or by `download(handle)`, which writes exactly `num_bytes`.

        `check` is called while another's download of it is waited for. Whatever either raises passes through, and
        nothing of it is kept.
        """
        name = hashlib.sha256(repr(identity).encode()).hexdigest()
        whole, partial = self._whole / name, self._partial / name
        while True:
            with suppress(FileNotFoundError):
                os.utime(whole)
                handle = os.open(whole, os.O_RDONLY | os.O_CLOEXEC)
                metrics.CACHE_HITS.inc()
                return open(handle, "rb")
            self._make_folders()
            with _locked(partial, check) as handle:
                # Otherwise it was finished, or given up, by the one who had the lock before.
                if not _is_at(partial, handle):
                    continue
                # Finished between our look for it and our opening of a new, empty partial.
                if whole.exists():
                    partial.unlink()
                    continue
                return self._download(handle, partial, whole, num_bytes, download)

    def open_unkept(self, download: Callable[[int], None]) -> BinaryIO:
        """As `open`, for a medium of no identity or room: in a nameless file, gone when it is closed."""
        self._make_folders()
        with tempfile.TemporaryFile(dir=self._partial) as file:
            download(file.fileno())
            _count_miss(file.fileno())
            return _reopen(file.fileno())

    @property
    def num_bytes(self) -> int:
        """Promised to media here and under way, or more."""
        with suppress(FileNotFoundError, ValueError):
            return int(self._ledger.read_bytes() or 0)
        return 0

    def _download(
        self, handle: int, partial: Path, whole: Path, num_bytes: int, download: Callable[[int], None]
    ) -> BinaryIO:
        if not self._reserve(handle, num_bytes):
            # Not to be shared: whoever waits for this lock had better begin.
            partial.unlink()
            fcntl.flock(handle, fcntl.LOCK_UN)
            os.truncate(handle, 0)  # a dead worker's part of it
            return self.open_unkept(download)
        try:
            download(handle)
            # The name must not outlast a power failure without the bytes.
            os.fdatasync(handle)
            partial.rename(whole)
        except BaseException:
            with _locked(self._ledger) as ledger:
                partial.unlink(missing_ok=True)
                _write_promised(ledger, _read_promised(ledger) - num_bytes)
            raise
        _count_miss(handle)
        return _reopen(handle)

    def _reserve(self, handle: int, num_bytes: int) -> bool:
        if num_bytes > self._max_bytes:
            return False
        with _locked(self._ledger) as ledger:
            promised = _read_promised(ledger)
            if promised + num_bytes > self._max_bytes:
                promised = self._evict(int(self._max_bytes * (1 - _EVICTED_SHARE)) - num_bytes)
            if promised + num_bytes > self._max_bytes:
                # Downloads under way take what there is; what they leave of the count is right again.
                _write_promised(ledger, promised)
                return False
            _write_promised(ledger, promised + num_bytes)
            os.truncate(handle, 0)
            os.truncate(handle, num_bytes)
        return True

    def _evict(self, max_bytes: int) -> int:
        """Remove whole media until all take at most `max_bytes`, if that can be; returns what they take."""
        # Before the whole ones: what is finished meanwhile is counted twice, not overlooked.
        num_bytes = sum(_measure_partial(Path(entry)) for entry in os.scandir(self._partial))
        kept = []
        for entry in os.scandir(self._whole):
            # Another worker may remove it at any moment.
            with suppress(FileNotFoundError):
                found = entry.stat()
                kept.append((found.st_mtime_ns, found.st_size, entry.path))
        num_bytes += sum(size for _, size, _ in kept)
        for _, size, path in sorted(kept):
            if num_bytes <= max_bytes:
                break
            Path(path).unlink(missing_ok=True)
            num_bytes -= size
        return num_bytes

    def _make_folders(self) -> None:
        """Each time: what tidies temporary folders takes empty ones too."""
        self._whole.mkdir(parents=True, exist_ok=True)
        self._partial.mkdir(exist_ok=True)


def _count_miss(handle: int) -> None:
    metrics.CACHE_MISSES.inc()
    metrics.FETCHED_BYTES.inc(os.fstat(handle).st_size)


def _read_promised(ledger: int) -> int:
    return int(os.pread(ledger, 32, 0) or _UNKNOWN_BYTES)


def _write_promised(ledger: int, num_bytes: int) -> None:
    # One write of one length: a kill leaves the old number or the new one.
    os.pwrite(ledger, b"%020d" % num_bytes, 0)


@contextmanager
def _locked(path: Path, check: Callable[[], None] | None = None) -> Iterator[int]:
    """A handle of `path`, made where it is missing, locked. Who waited may find the path gone or another's.

    With `check` the wait may be long, and ends by what it raises.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if check is None:
            fcntl.flock(handle, fcntl.LOCK_EX)
        else:
            while not _try_lock(handle):
                check()
                time.sleep(_TICK_SECONDS)
        yield handle
    finally:
        # Closing alone would leave the lock to a child that was forked meanwhile.
        fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def _reopen(handle: int) -> BinaryIO:
    """The file from its start, for reading only: decoders are handed it."""
    return open(f"/proc/self/fd/{handle}", "rb")


def _measure_partial(path: Path) -> int:
    """How many bytes a download under way takes; one that was abandoned is removed."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return 0
    try:
        if not _try_lock(handle):
            return os.fstat(handle).st_size
        if _is_at(path, handle):
            path.unlink()
        return 0
    finally:
        fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)
