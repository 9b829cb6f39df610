"""Pictures that are made to hurt whoever decodes them, each of them small."""

import struct


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
