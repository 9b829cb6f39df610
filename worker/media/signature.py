"""What a file is, by its first bytes. Names and types that callers give are not believed."""

import re
from typing import BinaryIO, NamedTuple

_HEAD_BYTES = 768


class FileFormat(NamedTuple):
    """`name` is for people; `demuxer` is FFmpeg's name of the one reader that may open it as a video, if any may."""

    name: str
    demuxer: str | None = None


# The first that matches wins. Sources: the formats' own specifications.
_SIGNATURES: tuple[tuple[re.Pattern[bytes], FileFormat], ...] = tuple(
    (re.compile(pattern, re.DOTALL), file_format)
    for pattern, file_format in (
        (rb"\xff\xd8\xff", FileFormat("JPEG")),
        (rb"\x89PNG\r\n\x1a\n", FileFormat("PNG")),
        (rb"GIF8[79]a", FileFormat("GIF", "gif")),
        (rb"RIFF....WEBP", FileFormat("WEBP")),
        (rb"II\*\0|MM\0\*", FileFormat("TIFF")),
        (rb"BM.{4}\0\0\0\0", FileFormat("BMP")),
        (rb".{4}ftyp(avif|avis)", FileFormat("AVIF")),
        (rb".{4}ftyp(heic|heix|heim|heis|mif1|msf1)", FileFormat("HEIF")),
        (rb".{4}(ftyp|styp|moov|moof|mdat|free|skip|wide|pnot)", FileFormat("MP4", "mov")),
        (rb"\x1aE\xdf\xa3", FileFormat("Matroska or WebM", "matroska")),
        (rb"RIFF....AVI ", FileFormat("AVI", "avi")),
        (rb"\x47.{187}\x47.{187}\x47", FileFormat("MPEG-TS", "mpegts")),
        (rb".{4}\x47.{191}\x47.{191}\x47", FileFormat("MPEG-TS", "mpegts")),
        (rb"\0\0\x01\xba", FileFormat("MPEG-PS", "mpeg")),
        (rb"FLV\x01", FileFormat("FLV", "flv")),
        (rb"OggS", FileFormat("Ogg", "ogg")),
        (rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11", FileFormat("WMV", "asf")),
        # Manifests make readers open further files and addresses, so they have a name but no demuxer.
        (rb"\s*(#EXTM3U|ffconcat|\[playlist\]|<\?xml|<MPD|<SmoothStreamingMedia)", FileFormat("a playlist")),
        (rb"%PDF", FileFormat("a PDF")),
        (rb"PK\x03\x04", FileFormat("a ZIP archive")),
        (rb"[\t\n\r\x20-\x7e]+\Z", FileFormat("text")),
    )
)


def recognise_format(file: BinaryIO) -> FileFormat:
    """Look at the first bytes of a seekable `file` and leave it at its start."""
    head = file.read(_HEAD_BYTES)
    file.seek(0)
    matches = (file_format for pattern, file_format in _SIGNATURES if pattern.match(head))
    return next(matches, FileFormat("something unknown"))
