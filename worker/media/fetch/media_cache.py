"""Fetched media kept on disk, shared by all workers of a host. What makes two media the same is for who fetches."""

import ctypes
import errno
import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from stat import S_ISREG
from typing import BinaryIO, TypeVar

from keye.worker.media.fetch.digests import Digests, digest_of
from keye.worker.media.fetch.fetched import Fetched, Identity
from keye.worker.media.fetch.file_lock import (
    close_unlocked,
    is_at,
    lock,
    make_private,
    measure_held,
    open_file,
    remove,
    unlock,
)
from keye.worker.media.fetch.lack import is_lack
from keye.worker.media.fetch.ledger import Ledger, read_promised, write_promised
from keye.worker.private_folder import PrivateFolder
from keye.worker.telemetry import metrics

log = logging.getLogger(__name__)

# Room made at once: every eviction reads the whole folder.
_EVICTED_SHARE = 0.1

_FULL = (errno.ENOSPC, errno.EDQUOT)
_ALL_BYTES = 2**62

# How often the folder may be deleted under one step.
_MAX_DELETIONS = 100

# As much as most media have, where nobody says how much it will be.
_USUAL_BYTES = 64 * 2**20
_CHUNK_BYTES = 2**20

Made = TypeVar("Made")


class MediaCache:
    """At most `max_bytes` in `folder`, the least recently used go first. With 0 nothing is kept.

    Threads and processes share a folder and, by locks on its files that end with their holder, its downloads: a medium
    that several want at once is downloaded by one of them. `whole` holds complete media, moved there in one step, and
    `digest` what is in each; `partial` holds those under way, at full length from the start, so that they count; what a
    killed process leaves in it is removed by the next to make room. `ledger` holds the number of bytes promised to
    `whole` and `partial`.

    All of it may be deleted at any moment: a medium that is open stays readable, and on the disk. What lies in there
    and is not of the cache, or is another user's, is passed over, or removed where it is in the way.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """Raises `OSError` when the folder cannot be had, `PermissionError` when it would not be this user's alone."""
        self._private = PrivateFolder(folder, "KEYE_CACHE_FOLDER")
        held = self._private.hold()
        self._whole = held / "whole"
        self._partial = held / "partial"
        self._digest = held / "digest"
        self._digests = Digests(self._digest)
        self._ledger = Ledger(held / "ledger")
        self._max_bytes = max_bytes

        def count() -> None:
            with self._ledger.locked() as ledger:
                write_promised(ledger, self._evict(max_bytes))

        self._in_folder(_USUAL_BYTES, count)

    def open(
        self,
        identity: tuple[str, ...],
        num_bytes: int,
        download: Callable[[int], None],
        check: Callable[[], None] = lambda: None,
    ) -> Fetched:
        """The medium of this identity, from here or by `download(handle)`, which writes exactly `num_bytes`.

        Where the disk turns out to be full, other media are given up and `download` is called again, for the same
        file. `check` is called while another's download is waited for, and while what is here is read to see whether it
        is right. Whatever either raises passes through, and nothing of it is kept. Raises `OSError` where the host
        cannot take it.
        """
        name = hashlib.sha256(repr(identity).encode()).hexdigest()
        path = self._partial / name
        while (found := self._find(name, num_bytes, check)) is None:
            handle = self._in_folder(num_bytes, partial(open_file, path))
            try:
                lock(handle, check)
                # Otherwise it was finished, or given up, by the one who had the lock before.
                if not is_at(path, handle):
                    continue
                # Finished between our look for it and our opening of a new, empty partial?
                if (found := self._find(name, num_bytes, check)) is None:
                    return self._download(handle, name, num_bytes, download, check)
                path.unlink(missing_ok=True)
                return found
            finally:
                close_unlocked(handle)
        return found

    def open_unkept(
        self, download: Callable[[int], None], num_bytes: int = 0, check: Callable[[], None] = lambda: None
    ) -> Fetched:
        """As `open`, for a medium of no identity or room: in a nameless file, gone when it is closed.

        `num_bytes` is its size, where that is known; `check` is called while its digest is taken.
        """
        with self._make_nameless(num_bytes) as file:
            self._with_room(0, partial(download, file.fileno()))
            digest = digest_of(file.fileno(), check)
            _count_miss(file.fileno())
            return _reopen(file.fileno(), digest)

    def prove(self) -> None:
        """That a medium of usual size can be written to the folder, for real. Raises `OSError` where it cannot."""
        disk = self._in_folder(0, partial(os.statvfs, self._whole))
        num_bytes = min(_USUAL_BYTES, disk.f_blocks * disk.f_frsize // 20) or _USUAL_BYTES

        def write(handle: int) -> None:
            os.lseek(handle, 0, os.SEEK_SET)
            with open(handle, "wb", closefd=False) as file:
                for start in range(0, num_bytes, _CHUNK_BYTES):
                    file.write(bytes(min(_CHUNK_BYTES, num_bytes - start)))
            os.fdatasync(handle)

        with self._make_nameless(num_bytes) as file:
            self._with_room(0, partial(write, file.fileno()))

    @property
    def num_bytes(self) -> int:
        """Promised to media here and under way, or more; 0 where nobody knows."""
        return self._ledger.read() or 0

    def _find(self, name: str, num_bytes: int, check: Callable[[], None]) -> Fetched | None:
        """The whole medium as it was downloaded. What is in its place, and is something else, makes way."""
        path = self._whole / name
        try:
            with self._private.named():
                handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as fault:
            if is_lack(fault):
                raise
            remove(path)
            return None
        digest = None
        try:
            if digest := self._digests.find_right(name, handle, num_bytes, check):
                with suppress(OSError):
                    # By the time of access; the other one tells whether it was changed.
                    os.utime(handle, ns=(time.time_ns(), os.fstat(handle).st_mtime_ns))
            else:
                self._discard(path, handle, num_bytes)
        finally:
            if not digest:
                os.close(handle)
        if not digest:
            return None
        metrics.CACHE_HITS.inc()
        return Fetched(open(handle, "rb"), Identity(num_bytes, digest.hex()))

    def _discard(self, path: Path, handle: int, num_bytes: int) -> None:
        found = os.fstat(handle)
        # What it counted with by now is one or the other.
        num_counted = min(found.st_size, num_bytes) if S_ISREG(found.st_mode) else 0
        with suppress(OSError), self._ledger.locked() as ledger:
            # Another may have been faster, and what is there now is right.
            if is_at(path, handle):
                remove(path)
                _withdraw(ledger, num_counted)

    def _download(
        self, handle: int, name: str, num_bytes: int, download: Callable[[int], None], check: Callable[[], None]
    ) -> Fetched:
        path = self._partial / name
        num_promised = 0
        try:
            if not self._in_folder(num_bytes, partial(self._reserve, handle, num_bytes)):
                # Not to be shared: whoever waits for this lock had better begin.
                path.unlink(missing_ok=True)
                unlock(handle)
                os.truncate(handle, 0)  # a dead worker's part of it
                return self.open_unkept(download, num_bytes, check)
            num_promised = num_bytes
            self._with_room(num_bytes, partial(_allocate, handle, num_bytes))
            self._with_room(0, partial(download, handle))
            # The name must not outlast a power failure without the bytes.
            os.fdatasync(handle)
            digest = digest_of(handle, check)
        except BaseException:
            self._release(path, handle, num_promised)
            raise
        try:
            self._in_folder(1, partial(self._keep, handle, name, digest))
        except OSError as fault:
            # Its job has it all the same.
            log.warning("a medium of %d bytes is used and not kept: %s", num_bytes, fault)
            self._release(path, handle, num_promised)
        _count_miss(handle)
        return _reopen(handle, digest)

    def _reserve(self, handle: int, num_bytes: int) -> bool:
        if num_bytes > self._max_bytes:
            return False
        with self._ledger.locked() as ledger:
            promised = read_promised(ledger)
            if promised is None or promised + num_bytes > self._max_bytes:
                promised = self._evict(int(self._max_bytes * (1 - _EVICTED_SHARE)) - num_bytes)
            has_room = promised + num_bytes <= self._max_bytes
            if has_room:
                os.truncate(handle, 0)
                os.truncate(handle, num_bytes)
            # Downloads under way may take what there is; what they leave of the count is right again.
            write_promised(ledger, promised + num_bytes if has_room else promised)
        return has_room

    def _keep(self, handle: int, name: str, digest: bytes) -> None:
        path = self._partial / name
        self._digests.note(name, handle, digest)
        if not is_at(path, handle):
            raise OSError("it was deleted meanwhile")
        path.rename(self._whole / name)

    def _release(self, path: Path, handle: int, num_bytes: int) -> None:
        """Of a download that came to nothing, or is not kept: its room, and its name."""

        def unlink() -> bool:
            is_there = is_at(path, handle)
            if is_there:
                path.unlink()
            return is_there

        try:
            with self._ledger.locked() as ledger:
                if unlink():
                    _withdraw(ledger, num_bytes)
                elif num_bytes:
                    # Deleted by somebody, and maybe counted anew without it.
                    write_promised(ledger, None)
        except OSError:
            with suppress(OSError):
                unlink()

    def _evict(self, max_bytes: int) -> int:
        """Remove whole media until all take at most `max_bytes`, if that can be; returns what they take."""
        # Before the whole ones: what is finished meanwhile is counted twice, not overlooked.
        under_way = {entry.name: measure_held(Path(entry))[0] for entry in os.scandir(self._partial)}
        kept = self._list_whole()
        num_bytes = sum(under_way.values()) + sum(size for _, size, _ in kept)
        self._digests.keep_only({*under_way, *(path.name for _, _, path in kept)})
        for _, size, path in sorted(kept):
            if num_bytes <= max_bytes:
                break
            with suppress(OSError):
                path.unlink(missing_ok=True)
                num_bytes -= size
        return num_bytes

    def _give_up(self, num_bytes: int, num_needed: int) -> bool:
        """Remove whole media, so many bytes or all there are, for a disk that is full; whether there were any.

        None where all of them would not make room for `num_needed`.
        """

        def remove_media() -> int:
            # What dead workers left is of no use to anybody.
            num_given_up = sum(measure_held(Path(entry))[1] for entry in os.scandir(self._partial))
            media, disk = sorted(self._list_whole()), os.statvfs(self._whole)
            if disk.f_bavail * disk.f_frsize + sum(size for _, size, _ in media) < num_needed:
                return num_given_up
            for _, size, path in media:
                if num_given_up >= num_bytes:
                    break
                with suppress(OSError):
                    path.unlink()
                    num_given_up += size
            return num_given_up

        with suppress(OSError):
            try:
                with self._ledger.locked() as ledger:
                    num_given_up = remove_media()
                    _withdraw(ledger, num_given_up)
            except OSError:
                # Even the ledger cannot be made anew, or not be read.
                num_given_up = remove_media()
            return num_given_up > 0
        return False

    def _list_whole(self) -> list[tuple[int, int, Path]]:
        """Last use, size and path of each whole medium."""
        media = []
        for entry in os.scandir(self._whole):
            # Another worker may remove it at any moment.
            with suppress(FileNotFoundError):
                found = entry.stat(follow_symlinks=False)
                if S_ISREG(found.st_mode):
                    media.append((found.st_atime_ns, found.st_size, Path(entry)))
        return media

    def _make_nameless(self, num_bytes: int) -> BinaryIO:
        def make() -> BinaryIO:
            file = tempfile.TemporaryFile(dir=self._partial)  # noqa: SIM115
            try:
                _allocate(file.fileno(), num_bytes)
            except BaseException:
                file.close()
                raise
            return file

        return self._in_folder(num_bytes, make)

    def _in_folder(self, num_bytes: int, act: Callable[[], Made]) -> Made:
        """As `_with_room`, in folders that are there, however often what tidies temporary folders deletes them."""

        def act_often() -> Made:
            num_deletions = 0
            while True:
                try:
                    with self._private.named():
                        self._make_folders()
                        return act()
                except (FileNotFoundError, NotADirectoryError):
                    num_deletions += 1
                    if num_deletions > _MAX_DELETIONS:
                        raise

        return self._with_room(num_bytes, act_often)

    def _with_room(self, num_bytes: int, act: Callable[[], Made]) -> Made:
        """What `act` returns, which is called again where the disk is full, once media are given up for it.

        At first as many as take `num_bytes`, or a usual medium with 0, then all.
        """
        num_wanted, num_in_vain = num_bytes or _USUAL_BYTES, 0
        while True:
            try:
                return act()
            except OSError as fault:
                if fault.errno not in _FULL:
                    raise
                num_in_vain = 0 if self._give_up(num_wanted, num_bytes) else num_in_vain + 1
                # Once more in any case: another may just have given them up, or have taken that room.
                if num_in_vain > 1:
                    raise
                num_wanted = _ALL_BYTES

    def _make_folders(self) -> None:
        self._private.hold()
        for folder in (self._whole, self._partial, self._digest):
            make_private(folder)


def _withdraw(ledger: int, num_bytes: int) -> None:
    promised = read_promised(ledger)
    write_promised(ledger, None if promised is None else promised - num_bytes)


def _allocate(handle: int, num_bytes: int) -> None:
    """Room for so many bytes, for real, so that a full disk is known before the download."""
    libc = ctypes.CDLL(None, use_errno=True)
    # The one of `os` writes to every block where the file system knows no such thing, and there we go without.
    while num_bytes and libc.fallocate(handle, 0, ctypes.c_int64(0), ctypes.c_int64(num_bytes)):
        number = ctypes.get_errno()
        if number in _FULL:
            # What it had got by then.
            size = os.fstat(handle).st_size
            os.truncate(handle, 0)
            os.truncate(handle, size)
            raise OSError(number, os.strerror(number))
        if number != errno.EINTR:
            return


def _count_miss(handle: int) -> None:
    metrics.CACHE_MISSES.inc()
    metrics.FETCHED_BYTES.inc(os.fstat(handle).st_size)


def _reopen(handle: int, digest: bytes) -> Fetched:
    """The file from its start, for reading only: decoders are handed it."""
    return Fetched(open(f"/proc/self/fd/{handle}", "rb"), Identity(os.fstat(handle).st_size, digest.hex()))
