"""Whether a medium is an image or a video, told by a reference's suffix or by the first bytes. Opens nothing."""

import re
from pathlib import PurePosixPath
from typing import Literal, NamedTuple

MediaType = Literal["image", "video"]

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic"})
VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi"})


class ContentType(NamedTuple):
    media_type: MediaType
    mime: str
    suffix: str


# The first that matches wins. Workers look for themselves, and closer.
_SIGNATURES: tuple[tuple[re.Pattern[bytes], ContentType], ...] = tuple(
    (re.compile(pattern, re.DOTALL), content_type)
    for pattern, content_type in (
        (rb"\xff\xd8\xff", ContentType("image", "image/jpeg", ".jpg")),
        (rb"\x89PNG\r\n\x1a\n", ContentType("image", "image/png", ".png")),
        (rb"GIF8[79]a", ContentType("image", "image/gif", ".gif")),
        (rb"RIFF....WEBP", ContentType("image", "image/webp", ".webp")),
        (rb"II\*\0|MM\0\*", ContentType("image", "image/tiff", ".tiff")),
        (rb"BM.{4}\0\0\0\0", ContentType("image", "image/bmp", ".bmp")),
        (rb".{4}ftyp(avif|avis)", ContentType("image", "image/avif", ".avif")),
        (rb".{4}ftyp(heic|heix|mif1|msf1)", ContentType("image", "image/heic", ".heic")),
        (rb".{4}(ftyp|styp|moov|moof|mdat|free|skip|wide)", ContentType("video", "video/mp4", ".mp4")),
        (rb"\x1aE\xdf\xa3", ContentType("video", "video/webm", ".webm")),
        (rb"RIFF....AVI ", ContentType("video", "video/x-msvideo", ".avi")),
        (rb"\x47.{187}\x47", ContentType("video", "video/mp2t", ".ts")),
    )
)


def media_type_of(uri: str) -> MediaType | None:
    """`s3://bucket/cat.jpg` is an image, `/clips/1.mp4` a video; None where the reference does not tell."""
    if uri.startswith("data:image/"):
        return "image"
    if uri.startswith("data:video/"):
        return "video"
    suffix = PurePosixPath(uri.partition("?")[0]).suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return "image"
    return "video" if suffix in VIDEO_SUFFIXES else None


def content_type_of(content: bytes) -> ContentType | None:
    return next((content_type for pattern, content_type in _SIGNATURES if pattern.match(content)), None)
