"""The decoder children of a worker: lends them to jobs, replaces those that end, bounds the pixels of all jobs."""

import fcntl
import logging
import os
import time
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from mmap import mmap
from queue import Empty, SimpleQueue
from threading import Lock, RLock, Thread
from typing import Self

from keye.config.host import share_of_cores
from keye.worker.media.decode.decoder import Decoder, DecodingOrder, NoRoom
from keye.worker.media.decoded import Decoded
from keye.worker.media.limits import check_decoded_bytes

# What libraries leak is given back with the process.
MAX_MEDIA_A_CHILD = 500

_TICK_SECONDS = 0.1
_RETRY_SECONDS = 1.0

logger = logging.getLogger(__name__)


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


class DecoderPool:
    """A context manager; or `start` it and, once no job decodes any more, `stop` it. Threads may share it."""

    def __init__(
        self, num_decoders: int, silence_seconds: float, max_decoded_bytes: int, num_cores: int | None = None
    ) -> None:
        """`silence_seconds` is how long a child may go without news, such as another frame of its video.

        `num_cores` are those of all children together, by default all that this process may use.
        """
        self.num_decoders = num_decoders
        self._num_cores = num_cores or share_of_cores(num_workers=1)
        self._silence_seconds = silence_seconds
        self._budget = PixelBudget(max_decoded_bytes)
        self._allocating = Lock()
        self._idle: SimpleQueue[Decoder] = SimpleQueue()
        self._vacancies: SimpleQueue[bool] = SimpleQueue()
        self._keeper = Thread(target=self._keep, name="decoder-keeper", daemon=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Returns at once; jobs wait for the first child."""
        for _ in range(self.num_decoders):
            self._vacancies.put(True)
        self._keeper.start()

    def stop(self) -> None:
        self._vacancies.put(False)
        self._keeper.join()
        while not self._idle.empty():
            self._idle.get().kill()

    def share(self) -> AbstractContextManager[PixelShare]:
        """A job's share of the memory for pixels; see `PixelBudget`."""
        return self._budget.share()

    def decode(self, order: DecodingOrder, share: PixelShare) -> Decoded:
        """Waits for a child and for room. Raises `Fault`, or what `order`'s callables raise."""
        while True:
            decoder = self._take(order)
            try:
                return decoder.decode(order, partial(self._allocate, order, share), self._num_threads())
            except NoRoom as refusal:
                num_bytes = refusal.num_bytes
            finally:
                if decoder.is_free and decoder.num_decoded < MAX_MEDIA_A_CHILD:
                    self._idle.put(decoder)
                else:
                    self._replace(decoder)
            # Without a child, so that those who are to make room get on.
            order.on_wait()
            while not self._budget.has_room(share, num_bytes):
                order.check()
                time.sleep(_TICK_SECONDS)

    @property
    def num_busy(self) -> int:
        """Children that decode, or that are being started."""
        return self.num_decoders - self._idle.qsize()

    def _num_threads(self) -> int:
        """A child's part of the cores: more threads than cores cost a quarter more CPU time, and gain nothing."""
        return max(1, self._num_cores // self.num_busy)

    def _allocate(self, order: DecodingOrder, share: PixelShare, num_bytes: int) -> tuple[mmap, int] | None:
        # Media of one job ask side by side, and together get no more than one of them may.
        with self._allocating:
            check_decoded_bytes(num_bytes, order.limits.max_decoded_bytes - share.num_bytes)
            return self._budget.allocate(share, num_bytes)

    def _take(self, order: DecodingOrder) -> Decoder:
        if self._idle.empty():
            order.on_wait()
        while True:
            order.check()
            try:
                decoder = self._idle.get(timeout=_TICK_SECONDS)
            except Empty:
                continue
            if decoder.is_alive:
                return decoder
            # It died in its sleep, which is no fault of this medium.
            self._replace(decoder)

    def _replace(self, decoder: Decoder) -> None:
        decoder.kill()
        self._vacancies.put(True)

    def _keep(self) -> None:
        """All children are started by one thread, since the kernel ends them with the thread that started them."""
        while self._vacancies.get():
            try:
                self._idle.put(Decoder(self._silence_seconds))
            except OSError as error:
                logger.error("A decoder child cannot be started (%s); trying again in %g s", error, _RETRY_SECONDS)
                time.sleep(_RETRY_SECONDS)
                self._vacancies.put(True)


def _new_memory(num_bytes: int) -> tuple[mmap, int]:
    handle = os.memfd_create("keye-pixels", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(handle, num_bytes)
        # A child that shrank it would end the worker with SIGBUS.
        fcntl.fcntl(handle, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return mmap(handle, num_bytes), handle
    except OSError:
        os.close(handle)
        raise
