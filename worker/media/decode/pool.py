"""The decoder children of a worker: starts them, lends them to jobs, replaces those that end."""

import gc
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from mmap import mmap
from multiprocessing.connection import wait
from threading import Condition, Lock, Thread
from typing import Self

from keye.config.host import share_of_cores
from keye.config.settings import DecoderIsolation, Settings, VideoDecoder
from keye.worker.host_fault import HostFault
from keye.worker.media.decode.decoded_cache import DecodedCache
from keye.worker.media.decode.decoder import Decoder, DecodingOrder, Doubtful, NoRoom, NotBegun
from keye.worker.media.decode.pixel_budget import PixelBudget, PixelClaim, PixelShare
from keye.worker.media.decoded import Decoded
from keye.worker.media.faults import name_medium
from keye.worker.media.limits import check_decoded_bytes

# What libraries leak is given back with the process.
MAX_MEDIA_A_CHILD = 500

_TICK_SECONDS = 0.1
_RETRY_SECONDS = 1.0
# How long jobs wait where all there is are children that are being started. It takes a second, and some to read torch.
_PATIENCE_SECONDS = 20.0
_TORCH_SECONDS = 40.0

logger = logging.getLogger(__name__)


class DecoderPool:
    """A context manager; or `start` it and, once no job decodes any more, `stop` it. Threads may share it."""

    def __init__(
        self,
        num_decoders: int,
        silence_seconds: float,
        max_decoded_bytes: int,
        num_cores: int | None = None,
        video_decoder: VideoDecoder = "pyav",
        isolation: DecoderIsolation = "worker",
        cache_bytes: int = 0,
    ) -> None:
        """`silence_seconds` is how long a child may go without news, such as another frame of its video.

        `num_cores` are those of all children together, by default all that this process may use. Where `isolation` is
        "job" a child ends with the job that it has decoded for, and up to `num_decoders` more wait that have seen none.
        `cache_bytes` of what was decoded, at most, are kept for the next jobs; not where each is to have its own child.
        """
        self.num_decoders = num_decoders
        self._num_cores = num_cores or share_of_cores(num_workers=1)
        self._silence_seconds = silence_seconds
        self._video_decoder = video_decoder
        self._max_decoded_bytes = max_decoded_bytes
        self._is_by_job = isolation == "job"
        self._cache = DecodedCache(0 if self._is_by_job else cache_bytes)
        self._budget = PixelBudget(max_decoded_bytes, self._cache.drop)
        self._allocating = Lock()
        self._freed_cycles_at = 0.0
        # Guards all that follows.
        self._changed = Condition()
        self._starting: list[Decoder] = []
        self._idle: list[Decoder] = []
        self._num_taken = 0
        # Idle ones that no other job may have.
        self._kept: list[tuple[PixelShare, Decoder]] = []
        # Of the media that are to be decoded alone, the first is, or will be once nothing else is.
        self._suspects: list[DecodingOrder] = []
        # Why no child can be started, and when that was found.
        self._refusal: str | None = None
        self._refused_at = 0.0
        self._is_stopping = False
        self._keeper = Thread(target=self._keep, name="decoder-keeper", daemon=True)

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """As a worker of these settings decodes."""
        return cls(
            *(settings.decoders, settings.decode_timeout_seconds, settings.max_decoded_bytes),
            share_of_cores(settings.host_workers),
            settings.video_decoder,
            settings.decoder_isolation,
            settings.frames_cache_bytes,
        )

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Returns at once; jobs wait for the first child."""
        self._keeper.start()

    def stop(self) -> None:
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        self._keeper.join()
        decoders = [*self._starting, *self._idle, *(decoder for _, decoder in self._kept)]
        # All at once: on a busy host each takes its time to go, and a drain has ten seconds for this.
        for decoder in decoders:
            decoder.hang_up()
        for decoder in decoders:
            decoder.kill()

    @contextmanager
    def share(self) -> Iterator[PixelShare]:
        """A job's share of the memory for pixels, see `PixelBudget`, and of the children, see `isolation`."""
        with self._budget.share() as share:
            try:
                yield share
            finally:
                self._end_kept(share)

    def decode(self, order: DecodingOrder, share: PixelShare) -> Decoded:
        """Waits for a child and for room, unless it was decoded just so before, or is being decoded.

        Raises `Fault`, `HostFault`, `OSError`, or what `order`'s callables raise. Other jobs may have the same pixels,
        which cannot be written to.
        """
        return self._cache.open(order, share, partial(self._decode, order, share))

    def keep(self, owner: object, num_bytes: int) -> None:
        """Of what was made of pixels: counts beside them for as long as `owner` lives. Never waits."""
        self._budget.keep(owner, num_bytes)

    @property
    def num_cached_bytes(self) -> int:
        return self._cache.num_bytes

    def _decode(self, order: DecodingOrder, share: PixelShare, claim: PixelClaim) -> tuple[Decoded, Decoder]:
        """By a child, which is given too.

        A medium whose child died is tried once more while no other is decoded: where many take memory, or the host is
        unwell, the first death says little of it.
        """
        is_suspect = False
        while True:
            try:
                with self._child(order, share, is_suspect) as decoder:
                    allocate = partial(self._allocate, order, share, claim)
                    return decoder.decode(order, allocate, self._num_threads()), decoder
            except NotBegun:
                continue
            except Doubtful as doubt:
                if is_suspect:
                    raise doubt.verdict() from None
                logger.warning("%s is tried once more, alone: %s", name_medium(order.part.uri), doubt.verdict())
                is_suspect = True
                continue
            except NoRoom:
                pass
            # Without a child, so that those who are to make room get on.
            order.on_wait("memory")
            while not self._budget.has_room(claim):
                order.check()
                self._free_cycles()
                time.sleep(_TICK_SECONDS)

    def _free_cycles(self) -> None:
        """An error that a library keeps, with all its frames refer to, can hold the pixels of a job that is over."""
        now = time.monotonic()
        if now - self._freed_cycles_at >= _RETRY_SECONDS:
            self._freed_cycles_at = now
            gc.collect()

    @property
    def num_busy(self) -> int:
        """Children that decode, or that are being started, where a job has to wait for those."""
        return self._num_taken if self._is_by_job else self.num_decoders - len(self._idle)

    def _num_threads(self) -> int:
        """A child's part of the cores: more threads than cores cost a quarter more CPU time, and gain nothing."""
        return max(1, self._num_cores // self.num_busy)

    def _allocate(
        self, order: DecodingOrder, share: PixelShare, claim: PixelClaim, num_bytes: int
    ) -> tuple[mmap, int] | None:
        # Media of one job ask side by side, and together get no more than one of them may.
        with self._allocating:
            check_decoded_bytes(num_bytes, order.limits.max_decoded_bytes - share.num_bytes)
            return self._budget.allocate(claim, num_bytes)

    @contextmanager
    def _child(self, order: DecodingOrder, share: PixelShare, is_suspect: bool) -> Iterator[Decoder]:
        """One that has started; a suspect's is the only one that decodes meanwhile."""
        if is_suspect:
            with self._changed:
                self._suspects.append(order)
        decoder = None
        try:
            decoder = self._take(order, share)
            yield decoder
        finally:
            is_good = decoder is not None and decoder.can_go_on and decoder.num_decoded < MAX_MEDIA_A_CHILD
            if decoder is not None and not is_good:
                decoder.kill()
            with self._changed:
                self._suspects = [suspect for suspect in self._suspects if suspect is not order]
                if decoder is not None:
                    self._num_taken -= 1
                if decoder is not None and is_good:
                    self._put_back(decoder, share)
                self._changed.notify_all()

    def _put_back(self, decoder: Decoder, share: PixelShare) -> None:
        if not self._is_by_job:
            self._idle.append(decoder)
        elif self._num_taken + len(self._kept) < self.num_decoders:
            self._kept.append((share, decoder))
        else:
            decoder.kill()

    def _end_kept(self, share: PixelShare) -> None:
        with self._changed:
            ended = [decoder for owner, decoder in self._kept if owner is share]
            self._kept = [(owner, decoder) for owner, decoder in self._kept if owner is not share]
        for decoder in ended:
            decoder.kill()

    def _take(self, order: DecodingOrder, share: PixelShare) -> Decoder:
        """Suspects go first, or they never would: nothing else begins while one waits."""
        has_waited = False
        while True:
            order.check()
            with self._changed:
                if (decoder := self._next_free(order, share)) is not None:
                    self._num_taken += 1
                    if self._num_taken + len(self._kept) > self.num_decoders:
                        self._kept.pop(0)[1].kill()
                    if self._is_by_job:
                        self._changed.notify_all()  # another is started in its place
                    return decoder
                if (refusal := self._why_none_comes()) is not None:
                    raise HostFault(refusal)
                if has_waited:
                    self._changed.wait(_TICK_SECONDS)
            if not has_waited:
                has_waited = True
                order.on_wait("decoder")

    def _next_free(self, order: DecodingOrder, share: PixelShare) -> Decoder | None:
        is_anothers_turn = self._suspects and (self._suspects[0] is not order or self._num_taken)
        if is_anothers_turn or self._num_taken == self.num_decoders:
            return None
        while (kept := next((each for each in self._kept if each[0] is share), None)) or self._idle:
            if kept:
                self._kept.remove(kept)
            decoder = kept[1] if kept else self._idle.pop(0)
            if decoder.is_alive:
                return decoder
            # It died in its sleep, which is no fault of this medium.
            decoder.kill()
            self._changed.notify_all()
        return None

    def _why_none_comes(self) -> str | None:
        """Why no job should wait for a child; None where one will be free, or has only just been started."""
        if self._idle or self._num_taken:
            return None
        if not self._starting:
            return self._refusal
        seconds = time.monotonic() - min(decoder.started_at for decoder in self._starting)
        if seconds < _PATIENCE_SECONDS + _TORCH_SECONDS * (self._video_decoder == "torchcodec"):
            return None
        return f"No decoder has come up within {seconds:.0f} s. Look at the host's load, disks and memory."

    @property
    def _num_missing(self) -> int:
        num_used = 0 if self._is_by_job else self._num_taken
        return self.num_decoders - len(self._starting) - len(self._idle) - num_used

    def _keep(self) -> None:
        """All children are started by one thread, since the kernel ends them with the thread that started them."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_stopping or self._starting or self._num_missing)
                if self._is_stopping:
                    return
                num_wanted = self._num_missing
                if self._refusal is not None:
                    # One shows whether any can be started again.
                    is_due = not self._starting and time.monotonic() >= self._refused_at + _RETRY_SECONDS
                    num_wanted = min(num_wanted, int(is_due))
            try:
                self._start(num_wanted)
                wait([decoder.fileno() for decoder in self._starting], _TICK_SECONDS)
                self._welcome()
            except Exception as error:  # whatever it is, it keeps children from being started
                self._refuse(error)

    def _start(self, num_wanted: int) -> None:
        for _ in range(num_wanted):
            if self._is_stopping:
                return
            decoder = Decoder(self._silence_seconds, self._video_decoder, self._max_decoded_bytes)
            with self._changed:
                self._starting.append(decoder)

    def _welcome(self) -> None:
        """Those that have come up since the last call."""
        for decoder in tuple(self._starting):
            has_started = False
            try:
                has_started = decoder.has_started()
            except BaseException:
                decoder.kill()
                with self._changed:
                    self._starting.remove(decoder)
                raise
            if has_started:
                with self._changed:
                    self._starting.remove(decoder)
                    self._idle.append(decoder)
                    has_recovered = self._refusal is not None and decoder.started_at > self._refused_at
                    self._refusal = None if has_recovered else self._refusal
                    self._changed.notify_all()
                if has_recovered:
                    logger.warning("Decoders can be started again")

    def _refuse(self, error: Exception) -> None:
        refusal = f"No decoder can be started: {error}. "
        refusal += "Raise the limits on processes, open files or memory, or lower KEYE_DECODERS."
        with self._changed:
            is_news = self._refusal is None
            self._refusal, self._refused_at = refusal, time.monotonic()
            self._changed.notify_all()
        if is_news:
            logger.error("%s It is tried again every %g s", refusal, _RETRY_SECONDS)
