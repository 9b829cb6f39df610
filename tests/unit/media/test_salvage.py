"""Pictures that are cut off or damaged are read as far as they are there, and what is missing is told."""

import io
import struct
import zlib

import numpy as np
import pytest
import skimage.data
from PIL import Image

from keye.config.codes import ErrorCode
from keye.config.faults import Fault
from keye.worker.media.decode.image import decode_image
from keye.worker.media.decoded import DecodedImage
from tests.unit.media.test_decode_image import encode

PHOTO = Image.fromarray(skimage.data.chelsea())  # 300 rows

CUT_BY_ROWS = [
    ("JPEG", {}),
    ("JPEG", {"subsampling": 0, "restart_marker_rows": 1}),
    ("PNG", {}),
    ("WEBP", {}),
    ("BMP", {}),
    ("TIFF", {}),
    ("GIF", {"interlace": 0}),
]


def decode(content: bytes, **options: object) -> DecodedImage:
    return decode_image(io.BytesIO(content), 10**7, **options)


def rows_alike(one: DecodedImage, other: DecodedImage) -> int:
    return int((one.pixels == other.pixels).all(axis=(1, 2)).sum())


@pytest.mark.holds("docs/operations.md#what-can-a-broken-or-hostile-file-do", "A picture that is cut off or damaged")
@pytest.mark.parametrize("share_left", [0.99, 0.75])
@pytest.mark.parametrize(("format", "options"), CUT_BY_ROWS)
def test_picture_that_is_cut_off_is_read_as_far_as_it_is_there(
    format: str, options: dict[str, object], share_left: float
) -> None:
    content = encode(PHOTO, format, **options)
    whole, cut = decode(content), decode(content[: int(share_left * len(content))])
    assert whole.rows_corrupt == 0
    assert whole.warnings == ()
    assert cut.rows_corrupt >= 1
    assert rows_alike(whole, cut) >= 300 - cut.rows_corrupt
    # No more is given up than that share and a row of blocks, those of lossy codecs twice.
    assert cut.rows_corrupt <= (1 - share_left) * 300 * 1.6 + 20
    (warning,) = cut.warnings
    assert f"{cut.rows_corrupt} of its 300 rows" in warning


@pytest.mark.parametrize(("format", "options"), CUT_BY_ROWS)
def test_picture_of_which_less_than_half_is_there_is_corrupt(format: str, options: dict[str, object]) -> None:
    content = encode(PHOTO, format, **options)
    with pytest.raises(Fault, match="damaged or cut off") as caught:
        decode(content[: len(content) // 3])
    assert caught.value.code is ErrorCode.MEDIA_CORRUPT


def test_what_is_missing_is_white_or_grey_and_nothing_else() -> None:
    for format, filler in (("PNG", 255), ("BMP", 255), ("TIFF", 255), ("WEBP", 255), ("JPEG", 128)):
        content = encode(PHOTO, format)
        cut = decode(content[: len(content) * 3 // 4])
        rows = slice(0, cut.rows_corrupt - 20) if format == "BMP" else slice(320 - cut.rows_corrupt, None)
        assert (cut.pixels[rows] == filler).all(), format


def test_missing_end_mark_costs_no_row() -> None:
    content = encode(PHOTO, "JPEG")
    cut = decode(content[:-2])
    assert rows_alike(cut, decode(content)) == 300
    assert cut.rows_corrupt == 0
    assert cut.warnings == ("The JPEG image is damaged or cut off, but all its rows could be read.",)


@pytest.mark.parametrize("spoilt", ["zeros", "ended"])
def test_transfer_that_broke_is_seen_however_the_file_ends(spoilt: str) -> None:
    """A file that was made in its full size beforehand, and one that a tool has put an end to."""
    content = encode(PHOTO, "JPEG")
    kept = content[: len(content) * 3 // 4]
    spoiled = kept + (bytes(len(content) - len(kept)) if spoilt == "zeros" else b"\xff\xd9")
    decoded = decode(spoiled)
    assert 40 < decoded.rows_corrupt < 120
    assert rows_alike(decode(content), decoded) >= 300 - decoded.rows_corrupt


def test_grey_picture_is_not_taken_for_a_damaged_one() -> None:
    for content in (
        encode(Image.new("RGB", (64, 64), (128, 128, 128)), "JPEG"),
        encode(Image.new("L", (64, 64), 128), "JPEG", progressive=True),
        encode(Image.new("L", (64, 64), 128), "JPEG", optimize=True),
    ):
        assert decode(content).warnings == ()
        assert decode(content).rows_corrupt == 0


@pytest.mark.parametrize(
    ("format", "options"), [("JPEG", {"progressive": True}), ("GIF", {"interlace": 1}), ("interlaced PNG", {})]
)
def test_picture_cut_off_in_its_details_is_whole_but_coarser(format: str, options: dict[str, object]) -> None:
    content = interlaced_png(np.asarray(PHOTO)) if "PNG" in format else encode(PHOTO, format, **options)
    whole, cut = decode(content), decode(content[: len(content) * 3 // 4])
    assert cut.rows_corrupt == 0
    assert "coarser" in cut.warnings[0]
    assert abs(cut.pixels.astype(int) - whole.pixels).mean() < 8


def test_photo_that_is_decoded_small_tells_the_rows_of_the_file() -> None:
    content = encode(PHOTO.resize((1804, 1200)), "JPEG")
    cut = decode(content[: len(content) * 3 // 4], fit=lambda _h, _w: (140, 224))
    assert cut.pixels.shape == (140, 224, 3)
    assert 200 < cut.rows_corrupt < 480
    assert "of its 1,200 rows" in cut.warnings[0]


def test_damage_in_the_middle_of_a_png_ends_it_there() -> None:
    content = bytearray(encode(PHOTO, "PNG"))
    content[len(content) * 3 // 4 :: 7] = bytes(len(content[len(content) * 3 // 4 :: 7]))
    decoded = decode(bytes(content))
    assert 30 < decoded.rows_corrupt < 140
    assert rows_alike(decode(encode(PHOTO, "PNG")), decoded) >= 290 - decoded.rows_corrupt


def test_orientation_of_what_was_cut_off_is_undone() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for format in ("JPEG", "TIFF"):
        content = encode(PHOTO, format, exif=exif)
        whole, cut = decode(content), decode(content[: len(content) * 8 // 10])
        assert cut.original_size == (451, 300)
        assert 30 < cut.rows_corrupt < 110
        assert (whole.pixels == cut.pixels).all(axis=(0, 2)).sum() >= 300 - cut.rows_corrupt


def interlaced_png(pixels: np.ndarray) -> bytes:
    """By the specification (Adam7), which Pillow reads and does not write."""
    height, width, _ = pixels.shape
    grids = ((0, 8, 0, 8), (0, 8, 4, 8), (4, 8, 0, 4), (0, 4, 2, 4), (2, 4, 0, 2), (0, 2, 1, 2), (1, 2, 0, 1))
    rows = b"".join(
        b"".join(b"\0" + row.tobytes() for row in pixels[top::down, left::across]) for top, down, left, across in grids
    )
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 1)),
        (b"IDAT", zlib.compress(rows, 1)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
