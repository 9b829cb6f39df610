"""The decoder children of a worker: lends them to jobs, replaces those that end, bounds the pixels of all jobs."""

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from mmap import mmap
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from types import TracebackType
from typing import Self

from keye.worker.media.decode.decoder import Decoder, DecodingOrder, NoRoom
from keye.worker.media.decode.pixel_budget import PixelBudget, PixelShare
from keye.worker.media.decoded import DecodedImage, DecodedVideo
from keye.worker.media.limits import check_decoded_bytes

# What libraries leak is given back with the process.
MAX_MEDIA_A_CHILD = 500

_TICK_SECONDS = 0.1
_RETRY_SECONDS = 1.0

logger = logging.getLogger(__name__)


class DecoderPool:
    """A context manager; or `start` it and, once no job decodes any more, `stop` it. Threads may share it."""

    def __init__(self, num_decoders: int, silence_seconds: float, max_decoded_bytes: int) -> None:
        """`silence_seconds` is how long a child may go without news, such as another frame of its video."""
        self.num_decoders = num_decoders
        self._silence_seconds = silence_seconds
        self._budget = PixelBudget(max_decoded_bytes)
        self._allocating = Lock()
        self._idle: SimpleQueue[Decoder] = SimpleQueue()
        self._vacancies: SimpleQueue[bool] = SimpleQueue()
        self._keeper = Thread(target=self._keep, name="decoder-keeper", daemon=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
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

    def decode(self, order: DecodingOrder, share: PixelShare) -> DecodedImage | DecodedVideo:
        """Waits for a child and for room. Raises `MediaFault`, or what `order`'s callables raise."""
        while True:
            try:
                with self._lend(order.check) as decoder:
                    return decoder.decode(order, partial(self._allocate, order, share), self._num_threads())
            except NoRoom as refusal:
                # Without a child, so that those who are to make room get on.
                while not self._budget.has_room(share, refusal.num_bytes):
                    order.check()
                    time.sleep(_TICK_SECONDS)

    def _num_threads(self) -> int:
        """A child's part of the cores: more threads than cores cost a quarter more CPU time, and gain nothing."""
        num_lent = self.num_decoders - self._idle.qsize()
        return max(1, len(os.sched_getaffinity(0)) // num_lent)

    def _allocate(self, order: DecodingOrder, share: PixelShare, num_bytes: int) -> tuple[mmap, int] | None:
        # Media of one job ask side by side, and together get no more than one of them may.
        with self._allocating:
            check_decoded_bytes(num_bytes, order.max_bytes - share.num_bytes, order.name)
            return self._budget.allocate(share, num_bytes)

    @contextmanager
    def _lend(self, check: Callable[[], None]) -> Iterator[Decoder]:
        decoder = self._take(check)
        try:
            yield decoder
        finally:
            if decoder.is_free and decoder.num_decoded < MAX_MEDIA_A_CHILD:
                self._idle.put(decoder)
            else:
                self._replace(decoder)

    def _take(self, check: Callable[[], None]) -> Decoder:
        while True:
            check()
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
