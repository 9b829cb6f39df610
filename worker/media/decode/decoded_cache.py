"""Decoded media kept in memory for the next question about them. What decodes, and who gets memory, is next door."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from threading import Lock

from keye.config.faults import Fault
from keye.config.job import VideoPart
from keye.worker.host_fault import HostFault
from keye.worker.media.decode.decoder import Decoder, DecodingOrder
from keye.worker.media.decode.pixel_budget import PixelClaim, PixelShare
from keye.worker.media.decoded import Decoded, DecodedVideo
from keye.worker.media.frames.video_plan import fit_of
from keye.worker.media.limits import check_decoded_bytes
from keye.worker.sizing import Size, Sizing, VideoFit
from keye.worker.telemetry import metrics

_TICK_SECONDS = 0.1

# Has a medium decoded, and tells by which child.
Decode = Callable[[PixelClaim], tuple[Decoded, Decoder]]


@dataclass(eq=False, slots=True)
class _Medium:
    """What is, or will be, decoded for a job with this `sizing`.

    The outcome is None where that failed, and cancelled where the job ended before.
    """

    claim: PixelClaim
    sizing: Sizing
    outcome: "Future[tuple[Decoded, Decoder] | None]"
    num_bytes: int = 0

    @property
    def decoded(self) -> Decoded | None:
        done = None if self.outcome.cancelled() else self.outcome.result()
        return done and done[0]

    @property
    def is_trusted(self) -> bool:
        """Whether its decoder lives on: nobody has had a reason to end it."""
        done = self.outcome.result()
        return done is not None and done[1].is_alive

    def suits(self, order: DecodingOrder) -> bool:
        """Whether `order`, of the same part and the same bytes, would come to the same."""
        decoded = self.decoded
        return decoded is not None and _shown(decoded, order, self.sizing) == _shown(decoded, order, order.sizing)


class DecodedCache:
    """At most `max_bytes`, the least recently used go first. With 0 nothing is kept, nor shared.

    What several jobs ask for at once is decoded for one of them. What a child has decoded is given to no new job once
    that child has ended: one that a medium took over lies for no longer than it lives.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._lock = Lock()
        # What was used last comes last; those that are being decoded are among them, and count nothing.
        self._media: OrderedDict[Hashable, _Medium] = OrderedDict()
        self.num_bytes = 0

    def open(self, order: DecodingOrder, share: PixelShare, decode: Decode) -> Decoded:
        """The medium from here, from another job that has it decoded now, or by `decode`.

        While another's is waited for, `order` is told so and asked. Where that one fails, this job has it decoded for
        itself, as its limits may be others.
        """
        key = _key(order) if self._max_bytes else None
        mine = _Medium(PixelClaim(), order.sizing, Future())
        while key is not None and (found := self._find(key, mine, order)) is not mine:
            try:
                if (decoded := _follow(found, order, share)) is not None:
                    metrics.FRAMES_CACHE_HITS.inc()
                    return decoded
                if not found.outcome.cancelled():
                    break
            finally:
                del found  # the traceback of an error would hold its pixels
        return self._lead(key, mine, order, share, decode)

    def drop(self) -> bool:
        """The least recently used; False where there is none."""
        with self._lock:
            oldest = next((key for key, medium in self._media.items() if medium.outcome.done()), None)
            if oldest is not None:
                self._put(oldest, None)
        return oldest is not None

    def _find(self, key: Hashable, mine: _Medium, order: DecodingOrder) -> _Medium:
        """`mine`, from now on, where there is none, or one that would not do."""
        with self._lock:
            found = self._media.get(key, mine)
            if found.outcome.done() and not (found.is_trusted and found.suits(order)):
                found = mine
            self._put(key, found)
            return found

    def _lead(
        self, key: Hashable | None, mine: _Medium, order: DecodingOrder, share: PixelShare, decode: Decode
    ) -> Decoded:
        metrics.FRAMES_CACHE_MISSES.inc()
        share.claims.append(mine.claim)
        try:
            decoded, decoder = decode(mine.claim)
        except BaseException as error:
            mine.claim.waits_for = 0
            share.claims.remove(mine.claim)
            self._keep(key, mine, 0)
            if isinstance(error, HostFault | OSError) or (isinstance(error, Fault) and error.code.startswith("MEDIA_")):
                mine.outcome.set_result(None)
            else:
                mine.outcome.cancel()
                mine.outcome.set_running_or_notify_cancel()
            raise
        is_known = key is not None and _key(order) == key  # and was not written to meanwhile
        mine.outcome.set_result((decoded, decoder) if is_known else None)
        self._keep(key, mine, mine.claim.num_bytes if is_known else 0)
        return decoded

    def _keep(self, key: Hashable, mine: _Medium, num_bytes: int) -> None:
        """Not where it has no bytes, or too many."""
        with self._lock:
            if self._media.get(key) is mine:
                self._put(key, None)
            mine.num_bytes = num_bytes
            if 0 < num_bytes <= self._max_bytes:
                self._put(key, mine)
        while self.num_bytes > self._max_bytes:
            self.drop()

    def _put(self, key: Hashable, medium: _Medium | None) -> None:
        """As the one used last, in the place of what is there. With the lock held."""
        if (before := self._media.pop(key, None)) is not None:
            self.num_bytes -= before.num_bytes
        if medium is not None:
            self._media[key] = medium
            self.num_bytes += medium.num_bytes


def _follow(medium: _Medium, order: DecodingOrder, share: PixelShare) -> Decoded | None:
    """None where nothing came of it that suits `order`."""
    # From now on it is waited for by this job, too, which may be the one that is to get room first.
    share.claims.append(medium.claim)
    is_had = False
    try:
        if not medium.outcome.done():
            order.on_wait("decoder")
        while not medium.outcome.done():
            order.check()
            wait([medium.outcome], _TICK_SECONDS)
        if medium.suits(order):
            num_bytes = medium.claim.num_bytes
            check_decoded_bytes(num_bytes, order.limits.max_decoded_bytes - (share.num_bytes - num_bytes))
            if isinstance(medium.decoded, DecodedVideo):
                num_frames = len(medium.decoded.frames)
                order.on_frame(num_frames, num_frames)
            is_had = True
        return medium.decoded if is_had else None
    finally:
        if not is_had:
            share.claims.remove(medium.claim)
        del medium


def _key(order: DecodingOrder) -> Hashable:
    """None where nothing tells the bytes of its medium from others."""
    content = order.content()
    return None if content is None else (content, order.part.model_dump_json(exclude={"uri", "digest"}))


def _shown(decoded: Decoded, order: DecodingOrder, sizing: Sizing) -> VideoFit | Size | None:
    """What of it is read, and how large, where the rule for sizes is `sizing`: all that depends on it."""
    part = order.part
    if isinstance(decoded, DecodedVideo):
        assert isinstance(part, VideoPart)
        return fit_of(decoded.plan, part, sizing.fit_video, decoded.original_size)
    return sizing.fit_image(part, *decoded.original_size) if sizing.is_bicubic else None
