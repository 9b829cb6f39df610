"""The front door of media: references in, pixels out. Fetching and decoding themselves live next door."""

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from threading import Event
from typing import BinaryIO

from config.error_codes import ErrorCode
from config.job import ImagePart, VideoPart
from worker.media.decoded import DecodedImage, DecodedVideo, FitFrame
from worker.media.decoder import DecodingOrder
from worker.media.decoder_pool import DecoderPool
from worker.media.fault import MediaFault
from worker.media.fetch_https import fetch_web
from worker.media.fetch_inline import open_inline
from worker.media.fetch_local import open_local
from worker.media.fetch_s3 import fetch_object
from worker.media.limits import MediaLimits
from worker.media.media_cache import MediaCache
from worker.media.medium_name import name_medium
from worker.media.transfer import Transfer

__all__ = [
    "DecodedImage",
    "DecodedVideo",
    "DecoderPool",
    "FetchedMedium",
    "FitFrame",
    "MediaCache",
    "MediaFault",
    "MediaLimits",
    "OnFrame",
    "decode",
    "fetch",
]

# Media of one job under way at once; each of them, where it is large, in several parts.
_MAX_DOWNLOADS = 8

# How often a job that waits for its downloads looks whether it is over.
_TICK_SECONDS = 0.1

# (media_index, frames done, frames in all), called after each frame of a video; what it raises ends the decoding.
OnFrame = Callable[[int, int, int], None]


def _tell_nobody(media_index: int, done: int, total: int) -> None: ...


def _go_on() -> None: ...


@dataclass(frozen=True, slots=True)
class FetchedMedium:
    """The bytes of a medium, here and open by the system, so that a child can be handed them.

    `name` is what messages call it.
    """

    name: str
    file: BinaryIO


def fetch(
    parts: Sequence[ImagePart | VideoPart],
    limits: MediaLimits,
    media_cache: MediaCache,
    check: Callable[[], None] = _go_on,
) -> list[FetchedMedium]:
    """Open every medium; what lies on other machines is downloaded, side by side, unless `media_cache` has it.

    `check` is called several times a second; what it raises ends the fetching at once, as does the `MediaFault` of the
    first medium that turns out not to be had. Hand the result to `decode`, which closes it.
    """
    given_up = Event()
    pool = ThreadPoolExecutor(min(_MAX_DOWNLOADS, len(parts)), "fetch")
    opening = [pool.submit(_open, part, limits, media_cache, partial(_stop_if, given_up)) for part in parts]
    try:
        while not _have_all_come(opening):
            check()
    except BaseException:
        given_up.set()
        for medium in opening:
            medium.add_done_callback(_close_late)
        raise
    finally:
        # Not waited for: what a silent store holds up must not hold up the end of the job.
        pool.shutdown(wait=False, cancel_futures=True)
    return [FetchedMedium(name_medium(part.uri), medium.result()) for part, medium in zip(parts, opening, strict=True)]


def _have_all_come(opening: "Sequence[Future[BinaryIO]]") -> bool:
    """Waits a tick for it. Raises what one of them failed by."""
    ended, waiting = wait(opening, _TICK_SECONDS, FIRST_EXCEPTION)
    for media_index, medium in enumerate(opening):
        if medium in ended and (error := medium.exception()):
            if isinstance(error, MediaFault):
                error.media_index = media_index
            raise error
    return not waiting


def _stop_if(given_up: Event) -> None:
    if given_up.is_set():
        raise CancelledError


def _close_late(medium: "Future[BinaryIO]") -> None:
    if not medium.cancelled() and not medium.exception():
        medium.result().close()


def decode(
    parts: Sequence[ImagePart | VideoPart],
    fetched: Sequence[FetchedMedium],
    limits: MediaLimits,
    fit_frame: FitFrame,
    decoders: DecoderPool,
    on_frame: OnFrame = _tell_nobody,
    check: Callable[[], None] = _go_on,
) -> list[DecodedImage | DecodedVideo]:
    """Turn what `fetch` opened into pixels, in order, and close it.

    `check` is called several times a second; what it raises ends the decoding. Raises `MediaFault` for the first medium
    that cannot be decoded within the limits.
    """
    decoded: list[DecodedImage | DecodedVideo] = []
    bytes_left = limits.max_decoded_bytes
    try:
        with decoders.share() as share:
            for part, medium in zip(parts, fetched, strict=True):
                order = DecodingOrder(
                    part,
                    medium.name,
                    medium.file,
                    limits.max_image_pixels,
                    bytes_left,
                    fit_frame,
                    partial(on_frame, len(decoded)),
                    check,
                    limits.video_decoder,
                )
                decoded.append(decoders.decode(order, share))
                bytes_left -= decoded[-1].num_bytes
                medium.file.close()  # at once: pixels take a handle too, and a job may have 64 media
    except MediaFault as fault:
        fault.media_index = len(decoded)
        raise
    finally:
        for medium in fetched:
            medium.file.close()
    return decoded


def _open(
    part: ImagePart | VideoPart, limits: MediaLimits, media_cache: MediaCache, check: Callable[[], None]
) -> BinaryIO:
    max_bytes = limits.max_image_bytes if isinstance(part, ImagePart) else limits.max_video_bytes
    patience = (limits.fetch_timeout_seconds, limits.max_fetch_seconds)
    transfer = Transfer(name_medium(part.uri), max_bytes, *patience, check)
    scheme = "" if part.uri.startswith("/") else part.uri.partition(":")[0].lower()
    match scheme:
        case "" | "file":
            return open_local(part.uri, limits.media_roots, max_bytes)
        case "s3":
            return fetch_object(part.uri, limits, transfer, media_cache)
        case "data":
            return open_inline(part.uri, max_bytes)
        case "https" if limits.allow_https:
            return fetch_web(part.uri, transfer, media_cache)
        case _:
            raise MediaFault(
                ErrorCode.MEDIA_FORBIDDEN,
                f"{transfer.name}: {scheme}: is off on this worker (KEYE_ALLOW_HTTPS). "
                "Put the file on S3 or below a media root.",
            )
