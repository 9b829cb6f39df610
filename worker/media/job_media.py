"""The front door of media: those of one job, from references to pixels. How one is had or decoded is next door."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import BinaryIO

from keye.config.codes import ErrorCode
from keye.config.faults import Fault
from keye.config.job import ImagePart, VideoPart
from keye.worker.media.decode.decoder import DecodingOrder
from keye.worker.media.decode.pool import DecoderPool
from keye.worker.media.decoded import Decoded, DecodedImage, DecodedVideo
from keye.worker.media.fetch.https import fetch_web
from keye.worker.media.fetch.local import open_inline, open_local
from keye.worker.media.fetch.media_cache import MediaCache
from keye.worker.media.fetch.s3 import fetch_object
from keye.worker.media.fetch.transfer import Transfer, name_medium
from keye.worker.media.limits import MediaLimits
from keye.worker.media.side_by_side import do_side_by_side
from keye.worker.sizing import Sizing

__all__ = [
    "DecodedImage",
    "DecodedVideo",
    "DecoderPool",
    "FetchedMedium",
    "MediaCache",
    "MediaLimits",
    "decode",
    "fetch",
]

# Media of one job under way at once; each of them, where it is large, in several parts.
_MAX_DOWNLOADS = 8


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
    check: Callable[[], None] = lambda: None,
) -> list[FetchedMedium]:
    """Open every medium; what lies on other machines is downloaded, side by side, unless `media_cache` has it.

    `check` is called several times a second; what it raises ends the fetching at once, as does the `Fault` of the
    first medium that turns out not to be had. Hand the result to `decode`, which closes it.
    """
    opening = [partial(_open, part, limits, media_cache) for part in parts]
    files = do_side_by_side(opening, _MAX_DOWNLOADS, check, _close_late)
    return [FetchedMedium(name_medium(part.uri), file) for part, file in zip(parts, files, strict=True)]


def _close_late(opening: "Sequence[Future[BinaryIO]]") -> None:
    """Not waited for: what a silent store holds up must not hold up the end of the job."""

    def close(medium: "Future[BinaryIO]") -> None:
        if not medium.exception():
            medium.result().close()

    for medium in opening:
        medium.add_done_callback(close)


def decode(
    parts: Sequence[ImagePart | VideoPart],
    fetched: Sequence[FetchedMedium],
    limits: MediaLimits,
    sizing: Sizing,
    decoders: DecoderPool,
    on_frame: Callable[[int, int, int], None] = lambda *_: None,
    check: Callable[[], None] = lambda: None,
) -> list[Decoded]:
    """Turn what `fetch` opened into pixels of the sizes that `sizing` asks for, side by side, in order, and close it.

    `check` is called several times a second; what it raises ends the decoding, as does the `Fault` of the first
    medium that turns out not to be decodable within the limits. `on_frame` is called by one thread at a time, after
    each frame of a video: (media_index, frames done, frames in all). What it raises ends the decoding too.
    """
    telling = Lock()

    def tell(media_index: int, done: int, total: int) -> None:
        with telling:
            on_frame(media_index, done, total)

    def decode_one(media_index: int, go_on: Callable[[], None]) -> Decoded:
        medium = fetched[media_index]
        order = DecodingOrder(
            parts[media_index],
            medium.name,
            medium.file,
            limits.max_image_pixels,
            limits.max_decoded_bytes,
            sizing,
            partial(tell, media_index),
            go_on,
            limits.video_decoder,
        )
        with medium.file:  # closed at once: pixels take a handle too, and a job may have 64 media
            return decoders.decode(order, share)

    try:
        with decoders.share() as share:
            decoding = [partial(decode_one, media_index) for media_index in range(len(fetched))]
            # Waited for: they still read the files and count in the share.
            return do_side_by_side(decoding, decoders.num_decoders, check, wait)
    finally:
        for medium in fetched:
            medium.file.close()


def _open(
    part: ImagePart | VideoPart, limits: MediaLimits, media_cache: MediaCache, check: Callable[[], None]
) -> BinaryIO:
    max_bytes = limits.max_image_bytes if isinstance(part, ImagePart) else limits.max_video_bytes
    name = name_medium(part.uri)
    transfer = Transfer(name, max_bytes, limits.fetch_timeout_seconds, limits.max_fetch_seconds, check)
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
            raise Fault(
                ErrorCode.MEDIA_FORBIDDEN,
                f"{name}: {scheme}: is off on this worker (KEYE_ALLOW_HTTPS). "
                "Put the file on S3 or below a media root.",
            )
