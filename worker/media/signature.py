"""What a file is, by its first bytes. Names and types that callers give are not believed."""

import re
from typing import BinaryIO, Literal, NamedTuple

_HEAD_BYTES = 768


class Content(NamedTuple):
    """`format` is a name for people; `demuxer` is FFmpeg's name of the one reader a video may be opened with."""

    kind: Literal["image", "video", "other"]
    format: str
    demuxer: str | None = None


# The first that matches wins. Sources: the formats' own specifications.
_SIGNATURES: tuple[tuple[re.Pattern[bytes], Content], ...] = tuple(
    (re.compile(pattern, re.DOTALL), content)
    for pattern, content in (
        (rb"\xff\xd8\xff", Content("image", "JPEG")),
        (rb"\x89PNG\r\n\x1a\n", Content("image", "PNG")),
        (rb"GIF8[79]a", Content("image", "GIF", "gif")),
        (rb"RIFF....WEBP", Content("image", "WEBP")),
        (rb"II\*\0|MM\0\*", Content("image", "TIFF")),
        (rb"BM.{4}\0\0\0\0", Content("image", "BMP")),
        (rb".{4}ftyp(avif|avis)", Content("image", "AVIF")),
        (rb".{4}ftyp(heic|heix|mif1|msf1)", Content("image", "HEIC")),
        (rb".{4}(ftyp|styp|moov|moof|mdat|free|skip|wide|pnot)", Content("video", "MP4", "mov")),
        (rb"\x1aE\xdf\xa3", Content("video", "Matroska or WebM", "matroska")),
        (rb"RIFF....AVI ", Content("video", "AVI", "avi")),
        (rb"\x47.{187}\x47.{187}\x47", Content("video", "MPEG-TS", "mpegts")),
        (rb".{4}\x47.{191}\x47.{191}\x47", Content("video", "MPEG-TS", "mpegts")),
        (rb"\0\0\x01\xba", Content("video", "MPEG-PS", "mpeg")),
        (rb"FLV\x01", Content("video", "FLV", "flv")),
        (rb"OggS", Content("video", "Ogg", "ogg")),
        (rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11", Content("video", "WMV", "asf")),
        # Manifests make readers open further files and addresses, so they have a name but no demuxer.
        (rb"\s*(#EXTM3U|ffconcat|\[playlist\]|<\?xml|<MPD|<SmoothStreamingMedia)", Content("other", "a playlist")),
        (rb"%PDF", Content("other", "a PDF")),
        (rb"PK\x03\x04", Content("other", "a ZIP archive")),
        (rb"[\t\n\r\x20-\x7e]+\Z", Content("other", "text")),
    )
)


def describe_content(file: BinaryIO) -> Content:
    """Look at the first bytes of a seekable `file` and leave it at its start."""
    head = file.read(_HEAD_BYTES)
    file.seek(0)
    matches = (content for pattern, content in _SIGNATURES if pattern.match(head))
    return next(matches, Content("other", "something unknown"))
