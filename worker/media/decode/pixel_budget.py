"""The memory for pixels of all jobs of a worker: who gets how much of it now. Knows no children."""

import errno
import fcntl
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from mmap import mmap
from queue import SimpleQueue
from resource import RLIMIT_FSIZE, getrlimit
from threading import RLock

from keye.worker.host_fault import HostFault


@dataclass(eq=False, slots=True)
class PixelClaim:
    """One medium's: it `waits_for` so many bytes, or has its `memory`, a weak reference, for as long as that lives."""

    waits_for: int = 0
    memory: Callable[[], mmap | None] = lambda: None

    @property
    def num_bytes(self) -> int:
        memory = self.memory()
        return 0 if memory is None else len(memory)


@dataclass(eq=False, slots=True)
class PixelShare:
    """The pixels of one job; see `PixelBudget`. Of a medium that several jobs ask about, all have the one claim."""

    claims: list[PixelClaim] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        return sum(claim.num_bytes for claim in self.claims)


class PixelBudget:
    """Grants memory while all of it together stays below `max_bytes`. Memory counts until nothing refers to it.

    Of the jobs that decode the eldest always gets on, and then the next, so nobody waits for ever: while it waits,
    others get only what leaves room for it, and once all that is held is of jobs that wait like itself, it gets more
    than `max_bytes`. All else goes by itself. `drop`, which is called first, gives up a medium that is kept for later;
    False where there is none.
    """

    def __init__(self, max_bytes: int, drop: Callable[[], bool] = lambda: False) -> None:
        self._max_bytes = max_bytes
        self._drop = drop
        self._lock = RLock()
        # Of jobs that decode, the eldest first.
        self._shares: list[PixelShare] = []
        self._num_bytes = 0
        # Finalizers put into it: they run in any thread at any moment, where a lock could be held already.
        self._freed: SimpleQueue[int] = SimpleQueue()

    @contextmanager
    def share(self) -> Iterator[PixelShare]:
        """A job's, while it decodes."""
        share = PixelShare()
        with self._lock:
            self._shares.append(share)
        try:
            yield share
        finally:
            with self._lock:
                self._shares.remove(share)

    @property
    def num_bytes(self) -> int:
        """Of all that lives."""
        with self._lock:
            while not self._freed.empty():
                self._num_bytes -= self._freed.get()
            return self._num_bytes

    def keep(self, owner: object, num_bytes: int) -> None:
        """Count what was made of pixels, too, for as long as `owner` lives. Never waits."""
        with self._lock:
            self._count(owner, num_bytes)
            self._fits(0)

    def has_room(self, claim: PixelClaim) -> bool:
        """For what it waits for."""
        with self._lock:
            return self._has_room(claim)

    def allocate(self, claim: PixelClaim, num_bytes: int) -> tuple[mmap, int] | None:
        """Memory and a handle of it to send and close; None where there is no room now: from then on `claim` waits."""
        with self._lock:
            claim.waits_for = num_bytes
            if not self._has_room(claim):
                return None
            # Counted only once it is there: where handles run out, nothing would ever give the bytes back.
            memory, handle = _new_memory(num_bytes)
            claim.memory = weakref.ref(memory)
            claim.waits_for = 0
            self._count(memory, num_bytes)
        return memory, handle

    def _count(self, owner: object, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        weakref.finalize(owner, self._freed.put, num_bytes).atexit = False

    def _has_room(self, claim: PixelClaim) -> bool:
        eldest = self._shares[0]
        is_eldest = claim in eldest.claims
        left_to_eldest = 0 if is_eldest else sum(each.waits_for for each in eldest.claims)
        if self._fits(claim.waits_for + left_to_eldest):
            return True
        if not is_eldest:
            return False
        stuck = [share for share in self._shares if share is eldest or any(each.waits_for for each in share.claims)]
        return sum(each.num_bytes for each in {each for share in stuck for each in share.claims}) == self._num_bytes

    def _fits(self, num_bytes: int) -> bool:
        while not (fits := self.num_bytes + num_bytes <= self._max_bytes) and self._drop():
            pass
        return fits


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
