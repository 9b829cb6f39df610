"""The front door of media: those of one job, from references to pixels. How one is had or decoded is next door."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from functools import partial
from threading import Lock
from typing import BinaryIO, Literal

from keye.config.faults import Fault
from keye.config.job import ImagePart, VideoPart
from keye.worker.media.decode.decoder import DecodingOrder
from keye.worker.media.decode.pool import DecoderPool
from keye.worker.media.decoded import Decoded, DecodedImage, DecodedVideo
from keye.worker.media.faults import forbidden, name_medium, named, unreachable
from keye.worker.media.fetch.digests import digest_of
from keye.worker.media.fetch.fetched import Fetched, Identity
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

_WRITTEN_TO = "It was written to while it was read: its size and time are those from before."


def fetch(
    parts: Sequence[ImagePart | VideoPart],
    limits: MediaLimits,
    media_cache: MediaCache,
    check: Callable[[], None] = lambda: None,
) -> list[Fetched]:
    """Open every medium; what lies on other machines is downloaded, side by side, unless `media_cache` has it.

    `check` is called several times a second; what it raises ends the fetching at once, as does the `Fault` of the
    first medium that turns out not to be had. Hand the media to `decode`, which closes them.
    """
    opening = [partial(_open, part, limits, media_cache) for part in parts]
    return do_side_by_side(opening, _MAX_DOWNLOADS, check, _close_late)


def _close_late(opening: "Sequence[Future[Fetched]]") -> None:
    """Not waited for: what a silent store holds up must not hold up the end of the job."""

    def close(medium: "Future[Fetched]") -> None:
        if not medium.exception():
            medium.result().close()

    for medium in opening:
        medium.add_done_callback(close)


def decode(
    parts: Sequence[ImagePart | VideoPart],
    fetched: Sequence[Fetched],
    limits: MediaLimits,
    sizing: Sizing,
    decoders: DecoderPool,
    on_frame: Callable[[int, int, int], None] = lambda *_: None,
    check: Callable[[], None] = lambda: None,
    on_wait: Callable[[Literal["decoder", "memory"]], None] = lambda _: None,
    on_begin: Callable[[], None] = lambda: None,
    on_end: Callable[[], None] = lambda: None,
) -> list[Decoded]:
    """Turn what `fetch` opened into pixels of the sizes that `sizing` asks for, side by side, in order, and close it.

    `check` is called several times a second; what it raises ends the decoding, as does the `Fault` of the first
    medium that turns out not to be decodable within the limits. `on_frame` is called by one thread at a time, after
    each frame of a video: (media_index, frames done, frames in all). What it raises ends the decoding too.
    `on_wait`, `on_begin` and `on_end` are called by each medium's own thread: where it has to wait, and what for, right
    before a decoder gets it, and once it has left it for good.
    """
    telling = Lock()

    def tell(media_index: int, done: int, total: int) -> None:
        with telling:
            on_frame(media_index, done, total)

    def decode_one(media_index: int, go_on: Callable[[], None]) -> Decoded:
        part, medium = parts[media_index], fetched[media_index]
        telling = (partial(tell, media_index), go_on, on_wait, on_begin)
        order = DecodingOrder(part, medium.file, limits, sizing, *telling, medium.content)
        # Closed at once: pixels take a handle too, and a job may have 64 media.
        with medium, named(name_medium(part.uri)):
            try:
                decoded = decoders.decode(order, share)
            finally:
                on_end()
            return _as_it_was(medium, decoded)

    try:
        with decoders.share() as share:
            decoding = [partial(decode_one, media_index) for media_index in range(len(fetched))]
            # Waited for: they still read the files and count in the share.
            return do_side_by_side(decoding, decoders.num_decoders, check, wait)
    finally:
        for medium in fetched:
            medium.close()


def _as_it_was(medium: Fetched, decoded: Decoded) -> Decoded:
    """With a warning where what was seen may be another file than its identity tells of; no digest tells so wrongly."""
    if not medium.was_written_to():
        return decoded
    if medium.identity.sha256 is not None:
        raise unreachable("was written to while it was read. Send it when it rests.")
    return replace(decoded, warnings=(*decoded.warnings, _WRITTEN_TO))


def _open(
    part: ImagePart | VideoPart, limits: MediaLimits, media_cache: MediaCache, check: Callable[[], None]
) -> Fetched:
    max_bytes = limits.max_image_bytes if isinstance(part, ImagePart) else limits.max_video_bytes
    transfer = Transfer(max_bytes, limits.fetch_timeout_seconds, limits.max_fetch_seconds, check)
    scheme = "" if part.uri.startswith("/") else part.uri.partition(":")[0].lower()
    # By the reference the caller knows: redirects lead to addresses that are not theirs to see.
    with named(name_medium(part.uri)):
        match scheme:
            case "" | "file":
                file = _open_below(limits.media_roots, part.uri, max_bytes)
                return _identified(file, Identity.of_local(file), part.digest, transfer)
            case "s3":
                return fetch_object(part.uri, limits, transfer, media_cache)
            case "data":
                file = open_inline(part.uri, max_bytes)
                return _identified(file, Identity(os.fstat(file.fileno()).st_size), True, transfer)
            case "https" if limits.allow_https:
                return fetch_web(part.uri, transfer, media_cache, limits.https_hosts)
            case _:
                what = f"{scheme}: is off on this worker (KEYE_ALLOW_HTTPS). Put the file on S3 or below a media root."
                raise forbidden(what)


def _identified(file: BinaryIO, identity: Identity, has_digest: bool, transfer: Transfer) -> Fetched:
    try:
        digest = digest_of(file.fileno(), transfer.go_on).hex() if has_digest else None
    except BaseException:
        file.close()
        raise
    return Fetched(file, replace(identity, sha256=digest))


def _open_below(roots: MediaRoots, uri: str, max_bytes: int) -> BinaryIO:
    """`open_local`, where a file that is not to be had is the caller's fault only if the roots are there."""
    roots.check()
    try:
        return open_local(uri, roots.paths, max_bytes)
    except Fault:
        roots.check_way(path_of(uri))
        raise
