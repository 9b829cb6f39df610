"""Notes in a picture's file, damaged, empty or huge, never make it unreadable."""

import io
import struct
import zlib

import pytest
from PIL import Image

from keye.worker.media.decode.image import decode_image
from tests.unit.media.test_decode_image import UPRIGHT, encode, quarters, read_quarters

BOMB = zlib.compress(bytes(64 * 2**20), 9)
PNG_NOTES = (b"cHRM", b"gAMA", b"pHYs", b"sRGB", b"tIME", b"bKGD", b"sBIT", b"hIST", b"acTL", b"fcTL", b"tRNS")
PNG_NOTES += (b"eXIf", b"iTXt", b"zTXt", b"tEXt", b"iCCP", b"sPLT", b"zzZz")
BROKEN_EXIF = b"MM\0*\0\0\0\x08\xff\xff\x01\x12"


def chunk(kind: bytes, data: bytes, is_right: bool = True) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) ^ (not is_right))


def segment(number: int, data: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, number, len(data) + 2) + data


IN_PNG = {
    **{f"empty {kind.decode()}": chunk(kind, b"") for kind in PNG_NOTES},
    **{f"short {kind.decode()}": chunk(kind, b"\x01") for kind in PNG_NOTES},
    **{f"wrong sum {kind.decode()}": chunk(kind, bytes(32), is_right=False) for kind in PNG_NOTES},
    "zTXt bomb": chunk(b"zTXt", b"a\0\0" + BOMB),
    "iTXt bomb": chunk(b"iTXt", b"a\0\1\0\0\0" + BOMB),
    "iCCP bomb": chunk(b"iCCP", b"a\0\0" + BOMB),
    "iCCP of another method": chunk(b"iCCP", b"a\0\1xx"),
    "much text": b"".join(chunk(b"tEXt", b"%d\0" % number + bytes(2**20)) for number in range(70)),
    "broken eXIf": chunk(b"eXIf", BROKEN_EXIF),
}
IN_JPEG = {
    "short JFIF": segment(0xE0, b"JFIF\0"),
    "empty ones": b"".join(segment(0xE0 + number, b"") for number in range(16)) + segment(0xFE, b""),
    "short Adobe": segment(0xEE, b"Adobe"),
    "broken EXIF": segment(0xE1, b"Exif\0\0" + BROKEN_EXIF),
    "empty EXIF": segment(0xE1, b"Exif\0\0"),
    "short ICC": segment(0xE2, b"ICC_PROFILE\0"),
    "part of an ICC": segment(0xE2, b"ICC_PROFILE\0\1\5abc"),
    "broken MPF": segment(0xE2, b"MPF\0MM\0*\0\0\0\x08\0\3\xb0\0"),
    "broken Photoshop": segment(0xED, b"Photoshop 3.0\x008BIM\3\xed\0\0\0\0\0\1a"),
    "broken XMP": segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0\xff<<"),
}


def check(content: bytes) -> None:
    decoded = decode_image(io.BytesIO(content), 10**6)
    assert read_quarters(decoded.pixels) == UPRIGHT
    assert (decoded.rows_corrupt, decoded.warnings) == (0, ())


@pytest.mark.holds("docs/operations.md#what-can-a-broken-or-hostile-file-do", "Notes beside the pixels")
@pytest.mark.filterwarnings("ignore:Invalid APNG", "ignore:Corrupt EXIF")
@pytest.mark.parametrize("what", IN_PNG)
def test_notes_of_a_png_do_not_matter(what: str) -> None:
    content = encode(quarters(), "PNG")
    for at in (33, len(content) - 12):
        check(content[:at] + IN_PNG[what] + content[at:])


@pytest.mark.filterwarnings("ignore:Corrupt EXIF", "ignore:Image appears to be a malformed MPO")
@pytest.mark.parametrize("what", IN_JPEG)
def test_notes_of_a_jpeg_do_not_matter(what: str) -> None:
    for content in (encode(quarters(), "JPEG"), encode(quarters(), "JPEG", progressive=True)):
        for at in (2, 20):
            check(content[:at] + IN_JPEG[what] + content[at:])


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("kind", [b"EXIF", b"XMP ", b"ICCP"])
def test_notes_of_a_webp_do_not_matter(kind: bytes) -> None:
    exif = Image.Exif()
    exif[0x0112] = 1
    content = encode(quarters(), "WEBP", exif=exif, xmp=b"x", icc_profile=bytes(30))
    at = content.index(kind)
    (length,) = struct.unpack_from("<I", content, at + 4)
    for data in (b"", b"\xff" * 30, BROKEN_EXIF):
        body = content[8:at] + struct.pack("<4sI", kind, len(data)) + data + content[at + 8 + length + length % 2 :]
        check(b"RIFF" + struct.pack("<I", len(body)) + body)


@pytest.mark.filterwarnings("ignore")
def test_tags_of_a_tiff_do_not_matter() -> None:
    exif = Image.Exif()
    exif[305] = "somebody's scanner"
    content = encode(quarters(), "TIFF", exif=exif, dpi=(72, 72), icc_profile=bytes(60), tiffinfo={700: b"<x>"})
    (folder,) = struct.unpack_from("<I", content, 4)
    (num_tags,) = struct.unpack_from("<H", content, folder)
    for at in range(folder + 2, folder + 2 + 12 * num_tags, 12):
        (tag,) = struct.unpack_from("<H", content, at)
        if tag not in (282, 283, 296, 305, 700, 34675):
            continue
        for kind in (0, 2, 5, 12, 999):
            for count, place in ((0, 0), (2, 8), (3, len(content) - 2), (2**32 - 1, 2**32 - 1)):
                broken = bytearray(content)
                struct.pack_into("<HII", broken, at + 2, kind, count, place)
                check(bytes(broken))
