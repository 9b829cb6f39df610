"""Pictures that are made to hurt whoever decodes them, none of them larger than a megabyte."""

import io
import struct
import zlib
from collections.abc import Callable

from PIL import Image, features

GOOD_PNG = b"\x89PNG\r\n\x1a\n"


def zeros(num_bytes: int) -> bytes:
    return zlib.compress(bytes(num_bytes), 9)


def saved(kind: str, size: tuple[int, int] = (16, 16), mode: str = "RGB", **options: object) -> bytearray:
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind, **options)
    return bytearray(file.getvalue())


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *chunks: tuple[bytes, bytes], interlaced: int = 0) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, interlaced)
    return GOOD_PNG + b"".join(chunk(*each) for each in ((b"IHDR", header), *chunks, (b"IEND", b"")))


def apng(num_frames: int) -> bytes:
    control = struct.pack(">IIIIIHHBB", 0, 16, 16, 0, 0, 0, 1, 0, 0)
    frames = [(b"fcTL", control), (b"fdAT", bytes(4) + zeros(784))] * 5000
    return png(16, 16, (b"acTL", struct.pack(">II", num_frames, 0)), (b"IDAT", zeros(784)), *frames)


def segment(marker: int, body: bytes) -> bytes:
    """Of a JPEG."""
    return struct.pack(">HH", 0xFF00 | marker, len(body) + 2) + body


def jpeg_of_scans(num_scans: int, side: int = 9984) -> bytes:
    """Progressive and grey. Each scan is some hundred bytes, and has all blocks of the picture visited to no avail."""
    runs, rest = divmod((side // 8) ** 2, 32767)
    # A code of one bit says that 2^14 blocks, and as many more as the 14 bits behind it say, have nothing to add.
    bits = ("0" + "1" * 14) * (runs + bool(rest))
    bits += "1" * (-len(bits) % 8)
    packed = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\x00")
    frame = segment(0xC2, struct.pack(">BHHB", 8, side, side, 1) + b"\1\x11\0")
    tables = segment(0xDB, bytes([0, *[1] * 64])) + segment(0xC4, b"\x10\1" + bytes(15) + b"\xe0")
    scan = segment(0xDA, b"\1\1\0\1\1\0") + packed
    return b"\xff\xd8" + frame + tables + scan * num_scans + b"\xff\xd9"


def jpeg_behind(segments: bytes) -> bytes:
    """A good one, with something before its frame."""
    jpeg = bytes(saved("JPEG"))
    return jpeg[:2] + segments + jpeg[2:]


def exif(*entries: tuple[int, int, int, int], following: int = 0) -> bytes:
    """Entries of (tag, type, count, value), and where the next directory is."""
    body = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + body + struct.pack("<I", following)


def jpeg_of_gigapixels() -> bytes:
    jpeg = saved("JPEG")
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = b"\xff\xff\xff\xff"
    return bytes(jpeg)


def tiff(tags: dict[int, tuple[int, int, int]], data: bytes = b"", following: int = 0) -> bytes:
    """`tags` are (type, count, value); `data` begins at 512."""
    good = {256: (3, 1, 16), 257: (3, 1, 16), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1), 273: (4, 1, 512)}
    every = sorted((good | {277: (3, 1, 1), 278: (3, 1, 16), 279: (4, 1, 256)} | tags).items())
    head = exif(*((tag, *rest) for tag, rest in every), following=following)
    return head.ljust(512, b"\0") + (data or bytes(256))


def tiff_of_strips(num_strips: int) -> bytes:
    """A row each; where they lie and how long they are is said by the same bytes."""
    places = {
        256: (4, 1, 705),
        257: (4, 1, num_strips),
        278: (4, 1, 1),
        273: (4, num_strips, 512),
        279: (4, num_strips, 512),
    }
    return tiff(places, struct.pack("<I", 1000) * num_strips)


def patched(file: bytearray, after: bytes, offset: int, value: bytes) -> bytes:
    at = file.index(after) + offset
    file[at : at + len(value)] = value
    return bytes(file)


def webp_of_268_megapixels() -> bytes:
    webp = saved("WEBP", lossless=True)
    canvas = struct.pack("<I", 10) + bytes(4) + (16382).to_bytes(3, "little") * 2
    return b"RIFF" + struct.pack("<I", len(webp) + 14) + b"WEBPVP8X" + canvas + bytes(webp[12:])


def bmp(width: int, height: int, compression: int, data: bytes) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, compression, len(data), 1, 1, 256, 0)
    return b"BM" + struct.pack("<IIII", 1078 + len(data), 0, 1078, 0)[:12] + header + bytes(1024) + data


def gif(*frames: bytes, width: int = 16, height: int = 16) -> bytes:
    return b"GIF89a" + struct.pack("<HH", width, height) + b"\x80\0\0" + bytes(6) + b"".join(frames) + b";"


def gif_frame(width: int = 1, height: int = 1) -> bytes:
    return b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x44\x01\0"


IMAGE_BOMBS: dict[str, Callable[[], bytes]] = {
    "400_megapixels.png": lambda: png(20_000, 20_000, (b"IDAT", zeros(100 * 2**20))),
    "2_gigapixels_wide.png": lambda: png(2**31 - 1, 1, (b"IDAT", zeros(2**20)), interlaced=1),
    "pixels_for_another_size.png": lambda: png(16, 16, (b"IDAT", zeros(128 * 2**20))),
    "endless_text.png": lambda: png(16, 16, *[(b"zTXt", b"note\0\0" + zeros(2**25))] * 8, (b"IDAT", zeros(1000))),
    "endless_words.png": lambda: png(16, 16, *[(b"iTXt", b"n\0\1\0\0\0" + zeros(2**25))] * 8, (b"IDAT", zeros(784))),
    "huge_profile.png": lambda: png(16, 16, (b"iCCP", b"icc\0\0" + zeros(128 * 2**20)), (b"IDAT", zeros(784))),
    "70000_chunks.png": lambda: png(16, 16, *[(b"tEXt", b"k\0")] * 70_000, (b"IDAT", zeros(784))),
    "chunk_of_4_gigabytes.png": lambda: GOOD_PNG + b"\xff\xff\xff\xffIHDR" + bytes(100),
    "million_frames.png": lambda: apng(10**6),
    "4_gigapixels.gif": lambda: gif(gif_frame(), width=65535, height=65535),
    "frame_beyond_the_screen.gif": lambda: gif(gif_frame(65535, 65535)),
    "50000_frames.gif": lambda: gif(*[gif_frame()] * 50_000),
    "endless_extensions.gif": lambda: gif(*[b"!\xfe\1a\0"] * 150_000, gif_frame()),
    "268_megapixels.webp": webp_of_268_megapixels,
    "frames_in_frames.webp": lambda: (
        b"RIFF\xff\xff\xff\x7fWEBP" + b"VP8X\n\0\0\0\2" + bytes(9) + b"ANMF\xf0\xff\0\0" * 999
    ),
    "4_gigapixels.bmp": lambda: bmp(65535, 65535, 1, b"\0\1"),
    "runs.bmp": lambda: bmp(9999, 9999, 1, b"\xff\0" * 200_000),
    "moves.bmp": lambda: bmp(9999, 9999, 1, b"\0\2\xff\xff" * 100_000 + b"\0\1"),
    "below_zero.bmp": lambda: bmp(16, -(2**31), 0, bytes(256)),
    "3_gigapixels.tiff": lambda: tiff({256: (4, 1, 60_000), 257: (4, 1, 60_000)}),
    "strip_of_4_gigabytes.tiff": lambda: tiff({279: (4, 1, 0xFFFFFFF0), 259: (3, 1, 8)}),
    "strips.tiff": lambda: tiff_of_strips(140_000),
    "deflated.tiff": lambda: tiff({259: (3, 1, 8), 279: (4, 1, 900_000)}, zeros(128 * 2**20)),
    "packed.tiff": lambda: tiff(
        {259: (3, 1, 32773), 256: (4, 1, 9999), 257: (4, 1, 9999), 278: (4, 1, 9999), 279: (4, 1, 10**6)},
        b"\x81\0" * 500_000,
    ),
    "ring.tiff": lambda: tiff({}, following=8),
    "endless_tag.tiff": lambda: tiff({270: (2, 0xFFFFFFFF, 512), 700: (12, 0x7FFFFFFF, 512)}),
    "tiles.tiff": lambda: tiff({322: (4, 1, 1), 323: (4, 1, 1), 324: (4, 256, 512), 325: (4, 256, 512)}, bytes(4096)),
    "tile_of_gigabytes.tiff": lambda: tiff({322: (4, 1, 2**31 - 16), 323: (4, 1, 2**31 - 16), 324: (4, 1, 512)}),
    "65535_samples.tiff": lambda: tiff({277: (3, 1, 65535), 258: (3, 65535, 512)}, bytes(131070)),
    "4_gigapixels.jpg": jpeg_of_gigapixels,
    "scans.jpg": lambda: jpeg_of_scans(5000),
    "tables.jpg": lambda: jpeg_behind(segment(0xC4, b"\0" + b"\1" + bytes(15) + b"\0") * 45_000),
    "comments.jpg": lambda: jpeg_behind(segment(0xFE, b"") * 250_000),
    "exif_ring.jpg": lambda: jpeg_behind(
        segment(0xE1, b"Exif\0\0" + exif((0x8769, 4, 1, 8), (0x0112, 3, 1, 6), following=8))
    ),
    "exif_of_gigabytes.jpg": lambda: jpeg_behind(segment(0xE1, b"Exif\0\0" + exif((0x0112, 3, 0xFFFFFFFF, 8)))),
    "restarts.jpg": lambda: bytes(saved("JPEG")).replace(b"\xff\xd9", b"") + b"\xff\xd0" * 500_000 + b"\xff\xd9",
    "icon.ico": lambda: b"\0\0\1\0\xff\xff" + bytes(2000),
    "layers.psd": lambda: b"8BPS\0\1" + bytes(6) + b"\0\x38" + b"\xff" * 1000,
    "tiles.jp2": lambda: b"\0\0\0\x0cjP  \r\n\x87\n" + b"\xff" * 1000,
    "program.eps": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run\n{} loop\n",
    "program.pdf": lambda: b"%PDF-1.7\n1 0 obj<</OpenAction<</S/Launch/F(/bin/sh)>>>>endobj\n",
    "entities.svg": lambda: (
        b'<?xml version="1.0"?><!DOCTYPE s [<!ENTITY a SYSTEM "file:///etc/passwd">]><svg>&a;</svg>'
    ),
}
if features.check("avif"):
    IMAGE_BOMBS["4_gigapixels.avif"] = lambda: patched(saved("AVIF"), b"ispe", 8, struct.pack(">II", 65535, 65535))
    IMAGE_BOMBS["boxes.avif"] = lambda: bytes(saved("AVIF"))[:32] + b"\0\0\0\x08meta" * 100_000
