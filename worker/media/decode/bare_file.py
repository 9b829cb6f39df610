"""A picture file without all that does not bear on its pixels: what makes no browser refuse it makes no worker do so.

Made of a file that its reader tripped over. Nothing that is left out is looked at, so compressed notes are never
inflated, however large they are said to be.
"""

import re
import struct
import zlib

import numpy as np

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
# Of the ancillary chunks, whose names begin with a small letter: which colour is transparent, and how it was held.
_PNG_KEPT = (b"tRNS", b"eXIf")
# By the kind of colours: how long the first of them is at least.
_TRNS_BYTES = {0: 2, 2: 6, 3: 1}
_PNG_NAME = re.compile(rb"[A-Za-z]{4}")

# How the pixels of a BMP are held.
_MASKS, _MASKS_AND_ALPHA = 3, 6
_BLOCK_PIXELS = 2**20

_JPEG_START, _JPEG_END = b"\xff\xd8", b"\xff\xd9"
_SCAN = 0xDA
# What an application's segment needs to bear on pixels: its head, and how long libjpeg wants it.
_JPEG_KEPT = {0xE0: (b"JFIF\0", 14), 0xE1: (b"Exif\0\0", 14), 0xEE: (b"Adobe", 12)}
_COMMENT = 0xFE
_STANDS_ALONE = (0x01, *range(0xD0, 0xD8))
_FRAMES = (*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))
_PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)
# In what is coded, 0xFF stands before a zero or the number of a restart.
_JPEG_MARKER = re.compile(rb"\xff+[^\0\xff\xd0-\xd7]")

_BLANK = bytes(64)

_WEBP_KEPT = (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF", b"EXIF")


def bare_png(content: bytes) -> bytes:
    """Header, palette, pixels, and of the rest what bears on them and whose sum is right; ends where the file breaks.

    An animation is left with its first picture.
    """
    kept, at = [_PNG_MAGIC], len(_PNG_MAGIC)
    while at + 8 <= len(content):
        length, name = struct.unpack_from(">I4s", content, at)
        end = at + 12 + length
        if not _PNG_NAME.fullmatch(name) or (end > len(content) and name != b"IDAT"):
            break
        chunk = content[at:end]
        is_ancillary = name[0] & 0x20
        is_right = chunk[-4:] == struct.pack(">I", zlib.crc32(chunk[4:-4]))
        is_right &= name != b"tRNS" or length >= _TRNS_BYTES.get(content[25], 0)
        if (name in _PNG_KEPT and is_right) or not is_ancillary:
            kept.append(chunk)
        if name == b"IEND" or (name == b"IDAT" and not is_right):
            break
        at = end
    return b"".join(kept)


def bare_bmp(content: bytes) -> bytes:
    """With a byte for each colour and alpha of a pixel, where masks say which bits of 16 or 32 these are."""
    (at,) = struct.unpack_from("<I", content, 10)
    header_bytes, width, height, _, bits, compression = struct.unpack_from("<IiiHHI", content, 14)
    if header_bytes < 40 or bits not in (16, 32) or compression not in (_MASKS, _MASKS_AND_ALPHA):
        return content
    masks = struct.unpack_from("<4I", content, 54)
    if header_bytes < 56 and compression == _MASKS:
        masks = (*masks[:3], 0)
    # A row ends at a multiple of four bytes.
    num_values = (width * bits + 31) // 32 * 32 // bits
    num_rows = min((len(content) - at) // (bits // 8) // num_values, abs(height))
    values = np.frombuffer(content, f"<u{bits // 8}", num_rows * num_values, at)
    values = values.reshape(num_rows, num_values)[:, :width].ravel()
    pixels = np.zeros((values.size, 4), np.uint8)
    for start in range(0, values.size, _BLOCK_PIXELS):
        block = values[start : start + _BLOCK_PIXELS].astype(np.uint64)
        for channel, mask in zip((2, 1, 0, 3), masks, strict=True):
            if mask:
                lowest = mask & -mask
                most = mask // lowest
                pixels[start : start + _BLOCK_PIXELS, channel] = ((block & mask) // lowest * 255 + most // 2) // most
    own_masks = (0xFF0000, 0xFF00, 0xFF, 0xFF000000 if masks[3] else 0)
    header = struct.pack("<IiiHHIIiiII4I52x", 108, width, height, 1, 32, _MASKS, 0, 0, 0, 0, 0, *own_masks)
    return struct.pack("<2sIHHI", b"BM", 0, 0, 0, 14 + len(header)) + header + pixels.tobytes()


class BareJpeg:
    """`head` ends where the first scan's data begins, `coded` is what follows, up to where a decoder would stop.

    `is_finished` where the end of the picture is marked as it should be.
    """

    def __init__(self, content: bytes) -> None:
        """Raises `ValueError`, `IndexError` or `struct.error` where there is no scan."""
        kept, at, num_components, self.is_progressive = [_JPEG_START], 2, 0, False
        while True:
            at = content.index(b"\xff", at)
            while content[at] == 0xFF:
                at += 1
            kind = content[at]
            at += 1
            if kind == 0 or kind in _STANDS_ALONE or kind == _JPEG_START[1]:
                continue
            (length,) = struct.unpack_from(">H", content, at)
            segment = content[at : at + length]
            at += length
            if kind in _FRAMES:
                num_components, self.is_progressive = segment[7], kind in _PROGRESSIVE
            if _bears_on_pixels(kind, segment):
                kept += [bytes((0xFF, kind)), segment]
            if kind == _SCAN:
                break
        self.head = b"".join(kept)
        # One of several scans is followed by tables and other scans.
        has_one_scan = not self.is_progressive and segment[2] == num_components
        end = self._end_of_scan(content, at) if has_one_scan else content.find(_JPEG_END, at)
        self.is_finished = content[end : end + 2] == _JPEG_END if end >= 0 else False
        coded = content[at : end if end >= 0 else None]
        if not self.is_finished:
            # What a broken transfer leaves behind the data it had is zeros. Half a marker would swallow what follows.
            coded = coded.rstrip(b"\0") if coded.endswith(_BLANK) else coded
            coded = coded.removesuffix(b"\xff")
        self.coded = coded

    @property
    def has_whole_outline(self) -> bool:
        """Whether a scan has ended: of a progressive picture, all rows are there then, if coarse."""
        return self.is_progressive and re.search(rb"\xff[\xc4\xda]", self.coded) is not None

    @staticmethod
    def _end_of_scan(content: bytes, at: int) -> int:
        marker = _JPEG_MARKER.search(content, at)
        return marker.end() - 2 if marker else -1


def _bears_on_pixels(kind: int, segment: bytes) -> bool:
    if kind in _JPEG_KEPT:
        begins, least = _JPEG_KEPT[kind]
        return len(segment) >= least + 2 and segment.startswith(begins, 2)
    return kind != _COMMENT and not 0xE0 <= kind <= 0xEF


def bare_webp(content: bytes, padding: bytes = b"") -> bytes:
    """The chunks of the picture; the last one, where it was cut off, made longer than it says by repeating `padding`.

    Raises `ValueError` for one that makes something of any bytes whatever, as lossless ones do.
    """
    kept, at = [], 12
    while at + 8 <= len(content):
        name, length = struct.unpack_from("<4sI", content, at)
        chunk, at = content[at : at + 8 + length + length % 2], at + 8 + length + length % 2
        if at > len(content) and padding:
            if name != b"VP8 ":
                raise ValueError("only lossy pictures are read in part")
            # Bytes by chance stand for fewer pixels than those that were written, so that it takes more of them.
            data = chunk[8:] + padding * (4 * min(at - len(content), 2**24) + 2**16)
            chunk = struct.pack("<4sI", name, len(data)) + data + bytes(len(data) % 2)
        if name in _WEBP_KEPT:
            kept.append(chunk)
    body = b"WEBP" + b"".join(kept)
    return struct.pack("<4sI", b"RIFF", len(body)) + body
