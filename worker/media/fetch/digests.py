"""Whether a file of the cache still holds what was downloaded: a crash or a repair of the disk may have cut it off."""

import errno
import hashlib
import logging
import os
from collections.abc import Callable, Container
from pathlib import Path

from keye.worker.media.fetch.file_lock import remove
from keye.worker.media.fetch.lack import is_lack
from keye.worker.private_folder import is_own_file

_CHUNK_BYTES = 2**18

log = logging.getLogger(__name__)

# Of media that this process knows to be right.
_MAX_KNOWN = 10_000


class Digests:
    """A file with a SHA-256 for each medium, not among the media: releases before 0.3 would take it for one.

    Threads share it. A medium is read whole once in a process, and again where its file, its size or its time of
    change is another.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[str, tuple[tuple[int, ...], bytes]] = {}

    def note(self, name: str, handle: int, digest: bytes) -> None:
        """Before the medium has its name. Raises `OSError`."""
        path = self._folder / name
        remove(path)
        with open(path, "xb") as file:
            file.write(digest)
        self._remember(name, _state_of(os.fstat(handle)), digest)

    def find_right(self, name: str, handle: int, num_bytes: int, check: Callable[[], None]) -> bytes | None:
        """The digest of the medium, where it is what was downloaded. `check` is called while it is read."""
        found = os.fstat(handle)
        state = _state_of(found)
        known_state, known = self._known.get(name, ((), None))
        if known_state == state:
            return known
        noted = self._noted(name)
        if noted is None:
            return None
        try:
            is_right = is_own_file(found) and found.st_size == num_bytes and digest_of(handle, check) == noted
        except OSError as fault:
            if fault.errno not in (errno.EIO, errno.ESTALE):
                raise
            is_right = False
        if not is_right:
            log.warning("%s in the media cache was cut off or altered, it is fetched again", name)
            return None
        self._remember(name, state, noted)
        return noted

    def keep_only(self, names: Container[str]) -> None:
        for entry in os.scandir(self._folder):
            if entry.name not in names:
                remove(Path(entry))

    def _noted(self, name: str) -> bytes | None:
        """None of what a release before 0.3 downloaded."""
        try:
            handle = os.open(self._folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as fault:
            if is_lack(fault):
                raise
            return None
        try:
            return os.read(handle, hashlib.sha256().digest_size + 1) if is_own_file(os.fstat(handle)) else None
        except OSError:
            return None
        finally:
            os.close(handle)

    def _remember(self, name: str, state: tuple[int, ...], digest: bytes) -> None:
        self._known[name] = state, digest
        if len(self._known) > _MAX_KNOWN:
            # Another thread may have been faster.
            self._known.pop(next(iter(self._known)), None)


def _state_of(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def digest_of(handle: int, check: Callable[[], None]) -> bytes:
    """Leaves the handle's place in the file as it is."""
    digest, num_read = hashlib.sha256(), 0
    # One buffer, which stays in the processor's cache: new ones took as long as the digest.
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    while num_bytes := os.preadv(handle, [buffer], num_read):
        digest.update(buffer[:num_bytes])
        num_read += num_bytes
        check()
    return digest.digest()
