"""The memory for pixels of all jobs of a worker: who gets how much of it now. Knows no children."""

import errno
import fcntl
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from mmap import mmap
from queue import SimpleQueue
from resource import RLIMIT_FSIZE, getrlimit
from threading import RLock

from keye.worker.host_fault import HostFault


@dataclass(eq=False, slots=True)
class PixelShare:
    """The pixels of one job; see `PixelBudget`."""

    num_bytes: int = 0
    is_decoding: bool = True


class PixelBudget:
    """Grants memory while all jobs together stay below `max_bytes`; more than that only to the job that began first.

    So the eldest always gets on, whoever else holds what, and then the next: nobody waits for ever. Memory counts
    until nothing refers to it any more.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._lock = RLock()
        self._shares: list[PixelShare] = []
        # Finalizers put into it: they run in any thread at any moment, where a lock could be held already.
        self._freed: SimpleQueue[tuple[PixelShare, int]] = SimpleQueue()

    @contextmanager
    def share(self) -> Iterator[PixelShare]:
        """A job's share, in use while the job decodes and while its pixels live."""
        share = PixelShare()
        with self._lock:
            self._shares.append(share)
        try:
            yield share
        finally:
            share.is_decoding = False

    def has_room(self, share: PixelShare, num_bytes: int) -> bool:
        with self._lock:
            while not self._freed.empty():
                freed, num_freed = self._freed.get()
                freed.num_bytes -= num_freed
            self._shares = [s for s in self._shares if s.is_decoding or s.num_bytes]
            return sum(s.num_bytes for s in self._shares) + num_bytes <= self._max_bytes or self._shares[0] is share

    def allocate(self, share: PixelShare, num_bytes: int) -> tuple[mmap, int] | None:
        """Memory and a handle of it to send and close; None where there is no room now."""
        with self._lock:
            if not self.has_room(share, num_bytes):
                return None
            # Counted only once it is there: where handles run out, nothing would ever give the bytes back.
            memory, handle = _new_memory(num_bytes)
            share.num_bytes += num_bytes
        weakref.finalize(memory, self._freed.put, (share, num_bytes)).atexit = False
        return memory, handle


def _new_memory(num_bytes: int) -> tuple[mmap, int]:
    handle = os.memfd_create("keye-pixels", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(handle, num_bytes)
        # A child that shrank it would end the worker with SIGBUS.
        fcntl.fcntl(handle, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return mmap(handle, num_bytes), handle
    except OSError as error:
        os.close(handle)
        if error.errno == errno.EFBIG:
            told = f"{num_bytes:,} bytes of pixels are more than a file may have here ({getrlimit(RLIMIT_FSIZE)[0]:,})"
            raise HostFault(f"{told}. Raise the worker's limit on the size of files (ulimit -f).") from None
        raise
