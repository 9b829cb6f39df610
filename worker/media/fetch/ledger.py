"""How many bytes of a cache are promised, to what is there and to what is under way: a file that workers share."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from keye.worker.media.fetch.file_lock import is_at, locked

_NUM_DIGITS = 20


class Ledger:
    """It says what is promised or more, never less. What makes no sense in it is unknown, to be counted anew."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextmanager
    def locked(self) -> Iterator[int]:
        """A handle for `read_promised` and `write_promised`. Raises `OSError`."""
        while True:
            with locked(self._path) as handle:
                # Who waited may hold one that was deleted, beside another who holds the new one.
                if is_at(self._path, handle):
                    yield handle
                    return

    def read(self) -> int | None:
        """Without a lock, for who only looks."""
        with suppress(OSError):
            handle = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                return read_promised(handle)
            finally:
                os.close(handle)
        return None


def read_promised(handle: int) -> int | None:
    text = os.pread(handle, _NUM_DIGITS + 1, 0)
    # More than a file system holds is no count either.
    return int(text) if len(text) == _NUM_DIGITS and text.isdigit() and int(text) < 2**62 else None


def write_promised(handle: int, num_bytes: int | None) -> None:
    """None is unknown."""
    with suppress(OSError):
        if num_bytes is not None:
            # One write of one length: a kill leaves the old number or the new one.
            os.pwrite(handle, b"%020d" % max(0, num_bytes), 0)
            os.truncate(handle, _NUM_DIGITS)
            return
    # A full disk may refuse a number; to empty the file takes no room.
    os.truncate(handle, 0)
