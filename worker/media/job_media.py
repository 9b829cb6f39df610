"""The front door of media: those of one job, from references to pixels. How one is had or decoded is next door."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from functools import partial
from threading import Lock
from typing import BinaryIO

from keye.config.faults import Fault
from keye.config.job import ImagePart, VideoPart
from keye.worker.media.decode.decoder import DecodingOrder
from keye.worker.media.decode.pool import DecoderPool
from keye.worker.media.decoded import Decoded, DecodedImage, DecodedVideo
from keye.worker.media.faults import forbidden, name_medium, named
from keye.worker.media.fetch.https import fetch_web
from keye.worker.media.fetch.local import open_inline, open_local, path_of
from keye.worker.media.fetch.media_cache import MediaCache
from keye.worker.media.fetch.s3 import fetch_object
from keye.worker.media.fetch.transfer import Transfer
from keye.worker.media.limits import MediaLimits
from keye.worker.media.media_roots import MediaRoots
from keye.worker.media.side_by_side import do_side_by_side
from keye.worker.sizing import Sizing

__all__ = ["DecodedImage", "DecodedVideo", "DecoderPool", "MediaCache", "MediaLimits", "decode", "fetch"]

# Media of one job under way at once; each of them, where it is large, in several parts.
_MAX_DOWNLOADS = 8


def fetch(
    parts: Sequence[ImagePart | VideoPart],
    limits: MediaLimits,
    media_cache: MediaCache,
    check: Callable[[], None] = lambda: None,
) -> list[BinaryIO]:
    """Open every medium; what lies on other machines is downloaded, side by side, unless `media_cache` has it.

    `check` is called several times a second; what it raises ends the fetching at once, as does the `Fault` of the
    first medium that turns out not to be had. Hand the files to `decode`, which closes them; they are the system's
    own, so that a child can be handed them.
    """
    opening = [partial(_open, part, limits, media_cache) for part in parts]
    return do_side_by_side(opening, _MAX_DOWNLOADS, check, _close_late)


def _close_late(opening: "Sequence[Future[BinaryIO]]") -> None:
    """Not waited for: what a silent store holds up must not hold up the end of the job."""

    def close(medium: "Future[BinaryIO]") -> None:
        if not medium.exception():
            medium.result().close()

    for medium in opening:
        medium.add_done_callback(close)


def decode(
    parts: Sequence[ImagePart | VideoPart],
    fetched: Sequence[BinaryIO],
    limits: MediaLimits,
    sizing: Sizing,
    decoders: DecoderPool,
    on_frame: Callable[[int, int, int], None] = lambda *_: None,
    check: Callable[[], None] = lambda: None,
    on_wait: Callable[[], None] = lambda: None,
    on_begin: Callable[[], None] = lambda: None,
    on_end: Callable[[], None] = lambda: None,
) -> list[Decoded]:
    """Turn what `fetch` opened into pixels of the sizes that `sizing` asks for, side by side, in order, and close it.

    `check` is called several times a second; what it raises ends the decoding, as does the `Fault` of the first
    medium that turns out not to be decodable within the limits. `on_frame` is called by one thread at a time, after
    each frame of a video: (media_index, frames done, frames in all). What it raises ends the decoding too.
    `on_wait`, `on_begin` and `on_end` are called by each medium's own thread: where it has to wait for a decoder or for
    room, right before a decoder gets it, and once it has left it for good.
    """
    telling = Lock()

    def tell(media_index: int, done: int, total: int) -> None:
        with telling:
            on_frame(media_index, done, total)

    def decode_one(media_index: int, go_on: Callable[[], None]) -> Decoded:
        part, file = parts[media_index], fetched[media_index]
        order = DecodingOrder(part, file, limits, sizing, partial(tell, media_index), go_on, on_wait, on_begin)
        # Closed at once: pixels take a handle too, and a job may have 64 media.
        with file, named(name_medium(part.uri)):
            try:
                return decoders.decode(order, share)
            finally:
                on_end()

    try:
        with decoders.share() as share:
            decoding = [partial(decode_one, media_index) for media_index in range(len(fetched))]
            # Waited for: they still read the files and count in the share.
            return do_side_by_side(decoding, decoders.num_decoders, check, wait)
    finally:
        for file in fetched:
            file.close()


def _open(
    part: ImagePart | VideoPart, limits: MediaLimits, media_cache: MediaCache, check: Callable[[], None]
) -> BinaryIO:
    max_bytes = limits.max_image_bytes if isinstance(part, ImagePart) else limits.max_video_bytes
    transfer = Transfer(max_bytes, limits.fetch_timeout_seconds, limits.max_fetch_seconds, check)
    scheme = "" if part.uri.startswith("/") else part.uri.partition(":")[0].lower()
    # By the reference the caller knows: redirects lead to addresses that are not theirs to see.
    with named(name_medium(part.uri)):
        match scheme:
            case "" | "file":
                return _open_below(limits.media_roots, part.uri, max_bytes)
            case "s3":
                return fetch_object(part.uri, limits, transfer, media_cache)
            case "data":
                return open_inline(part.uri, max_bytes)
            case "https" if limits.allow_https:
                return fetch_web(part.uri, transfer, media_cache, limits.https_hosts)
            case _:
                what = f"{scheme}: is off on this worker (KEYE_ALLOW_HTTPS). Put the file on S3 or below a media root."
                raise forbidden(what)


def _open_below(roots: MediaRoots, uri: str, max_bytes: int) -> BinaryIO:
    """`open_local`, where a file that is not to be had is the caller's fault only if the roots are there."""
    roots.check()
    try:
        return open_local(uri, roots.paths, max_bytes)
    except Fault:
        roots.check_way(path_of(uri))
        raise
