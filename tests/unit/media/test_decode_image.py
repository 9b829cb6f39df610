"""Every kind of picture that people send becomes upright RGB, or a fault that says what is wrong with it."""

import importlib.util
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import skimage
from PIL import ExifTags, Image, features

from keye.config.codes import ErrorCode
from keye.config.faults import Fault
from keye.worker.media.decode.image import decode_image
from keye.worker.media.decoded import DecodedImage
from keye.worker.sizing import resize
from tests.support.zoo import draw_quarters, read_quarters

RESIZED = Path(__file__).parents[2] / "golden" / "resized.npz"

UPRIGHT = ["red", "green", "blue", "yellow"]


def encode(picture: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def decode(content: bytes, max_pixels: int = 10**6) -> DecodedImage:
    return decode_image(io.BytesIO(content), max_pixels)


def quarters() -> Image.Image:
    return Image.fromarray(draw_quarters())


AVIF = pytest.param("AVIF", marks=pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF"))
HEIF = pytest.param(
    "HEIF",
    marks=pytest.mark.skipif(
        importlib.util.find_spec("pillow_heif") is None, reason="HEIC is off: pip install pillow-heif"
    ),
)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", AVIF, HEIF])
def test_each_format_keeps_its_colours_and_size(format: str) -> None:
    decoded = decode(encode(quarters(), format))
    assert decoded.pixels.shape == (64, 96, 3)
    assert decoded.original_size == (64, 96)
    assert read_quarters(decoded.pixels) == UPRIGHT


# How a camera held that way stores an upright scene: what each orientation's undoing is undone by.
STORED_AS = {
    1: lambda picture: picture,
    2: lambda picture: picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    3: lambda picture: picture.rotate(180),
    4: lambda picture: picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
    5: lambda picture: picture.transpose(Image.Transpose.TRANSPOSE),
    6: lambda picture: picture.rotate(90, expand=True),
    7: lambda picture: picture.transpose(Image.Transpose.TRANSVERSE),
    8: lambda picture: picture.rotate(-90, expand=True),
}


@pytest.mark.parametrize("orientation", STORED_AS)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", HEIF])
def test_exif_orientation_is_undone(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = STORED_AS[orientation](quarters())
    # HEIF turns pictures by marks of its own, which its writer makes of the notes that came with a picture.
    stored.info["exif"] = exif.tobytes()
    decoded = decode(encode(stored, format) if format == "HEIF" else encode(stored, format, exif=exif))
    assert read_quarters(decoded.pixels) == UPRIGHT
    assert decoded.original_size == (64, 96)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_camera_notes_do_not_spoil_the_picture() -> None:
    decoded = decode(encode(quarters(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12"))
    assert read_quarters(decoded.pixels) == UPRIGHT


@pytest.mark.holds("docs/model.md#pixels", "What is transparent lies on white")
@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF", HEIF])
def test_transparent_parts_are_white(format: str) -> None:
    picture = quarters().convert("RGBA")
    picture.paste((0, 0, 0, 0), (0, 0, 48, 32))
    pixels = np.asarray(decode(encode(picture, format)).pixels)
    assert (pixels[2:30, 2:46] > 250).all()
    assert read_quarters(pixels)[1:] == UPRIGHT[1:]


def test_half_transparent_black_is_grey() -> None:
    pixels = np.asarray(decode(encode(Image.new("RGBA", (8, 8), (0, 0, 0, 128)), "PNG")).pixels)
    assert abs(int(pixels[4, 4, 0]) - 127) <= 1


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_transparent_palette_entry_is_white(format: str) -> None:
    picture = Image.new("P", (8, 8), 1)
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.paste(0, (0, 0, 4, 8))
    pixels = np.asarray(decode(encode(picture, format, transparency=0)).pixels)
    assert pixels[4, 2].tolist() == [255, 255, 255]
    assert pixels[4, 6].tolist() == [0, 0, 255]


@pytest.mark.holds("docs/operations.md#which-media-does-a-worker-read", "GIF (its first picture)")
def test_first_picture_of_an_animation_is_taken() -> None:
    first, second = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
    pixels = np.asarray(decode(encode(first, "GIF", save_all=True, append_images=[second])).pixels)
    assert pixels[8, 8].tolist() == [255, 0, 0]


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_greys_are_scaled_not_clipped(format: str) -> None:
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16)
    pixels = np.asarray(decode(encode(Image.fromarray(np.tile(ramp, (8, 1))), format)).pixels)
    assert (pixels[4] == np.arange(256)[:, None]).all()


def test_16_bit_colours_are_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 256).round().astype(">u2")
    row = b"\0" + np.stack([ramp, np.zeros_like(ramp), ramp], axis=1).tobytes()
    pixels = np.asarray(decode(write_png(256, 8, row * 8, bit_depth=16, colour_type=2)).pixels)
    assert abs(pixels[4, :, 0].astype(int) - np.arange(256)).max() <= 1
    assert pixels[4, :, 1].max() == 0


def test_cmyk_photo_becomes_rgb() -> None:
    pixels = np.asarray(decode(encode(quarters().convert("CMYK"), "JPEG", quality=95)).pixels)
    assert read_quarters(pixels) == UPRIGHT


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA"])
def test_other_pixel_modes_become_rgb(mode: str) -> None:
    grey = Image.new("RGB", (16, 16), "black")
    grey.paste("white", (8, 0, 16, 16))
    content = encode(grey.convert("L").convert(mode), "TIFF" if mode == "PA" else "PNG")
    pixels = np.asarray(decode(content).pixels)
    assert pixels[8, 3].tolist() == [0, 0, 0]
    assert pixels[8, 12].tolist() == [255, 255, 255]


def test_photographs_and_scans_from_the_field_are_all_read() -> None:
    paths = [path for path in Path(skimage.data_dir).iterdir() if path.suffix in (".png", ".jpg", ".gif")]
    assert len(paths) > 20
    for path in paths:
        with path.open("rb") as file:
            decoded = decode_image(file, 10**8)
        spread = np.asarray(decoded.pixels).std()
        assert spread > 5, f"{path.name} came out nearly flat"


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", AVIF, HEIF])
def test_photo_of_which_little_is_left_is_corrupt(format: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    content = encode(Image.fromarray(noise), format)
    for share in (0.02, 0.3):
        with pytest.raises(Fault) as caught:
            decode(content[: int(len(content) * share) + 12])
        assert caught.value.code is ErrorCode.MEDIA_CORRUPT, share


@pytest.mark.parametrize("format", [HEIF])
def test_huge_photo_of_a_phone_is_refused_by_its_header(format: str) -> None:
    content = bytearray(encode(quarters(), format))
    at = content.index(b"ispe") + 8
    content[at : at + 8] = struct.pack(">II", 30_000, 20_000)
    with pytest.raises(Fault, match=r"600\.0 megapixels, the limit is 100\.0") as caught:
        decode(bytes(content), max_pixels=100_000_000)
    assert caught.value.code is ErrorCode.MEDIA_TOO_LARGE


def test_fault_says_what_the_file_is_instead() -> None:
    for content, looks_like in (
        (b"%PDF-1.7 ...", "PDF"),
        (b"hello", "text"),
        (b"\0\1\2\3" * 9, "unknown"),
    ):
        with pytest.raises(Fault, match=looks_like) as caught:
            decode(content)
        assert caught.value.code is ErrorCode.MEDIA_UNSUPPORTED


def test_bomb_is_refused_by_its_header_before_a_pixel_is_decoded() -> None:
    bomb = write_png(50_000, 50_000, b"", bit_depth=8, colour_type=2)
    with pytest.raises(Fault, match=r"2500\.0 megapixels, the limit is 100\.0") as caught:
        decode(bomb, max_pixels=100_000_000)
    assert caught.value.code is ErrorCode.MEDIA_TOO_LARGE


def test_photo_above_pillows_own_warning_level_is_read_without_a_warning() -> None:
    large = Image.new("L", (10_000, 9_000))
    assert decode(encode(large, "PNG"), max_pixels=100_000_000).original_size == (9_000, 10_000)


def write_png(width: int, height: int, rows: bytes, *, bit_depth: int, colour_type: int) -> bytes:
    """A PNG by the specification, for what Pillow reads and cannot write."""
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    )
    body = b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("orientation", [1, 6])
def test_large_jpeg_is_decoded_small_and_ends_at_the_size_the_model_reads(orientation: int) -> None:
    stored = STORED_AS[orientation](Image.fromarray(draw_quarters(1200, 1600)))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    file = io.BytesIO(encode(stored, "JPEG", exif=exif))
    asked: list[tuple[int, int]] = []

    def fit(height: int, width: int) -> tuple[int, int]:
        asked.append((height, width))
        return 476, 644

    decoded = decode_image(file, 10**7, fit=fit)
    assert asked == [(1200, 1600)]
    assert decoded.original_size == (1200, 1600)
    assert decoded.pixels.shape == (476, 644, 3)
    assert read_quarters(decoded.pixels) == UPRIGHT
    whole = Image.fromarray(decode_image(file, 10**7).pixels).resize((644, 476), Image.Resampling.BICUBIC)
    assert abs(decoded.pixels.astype(int) - np.asarray(whole)).mean() < 1


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_image_that_is_not_halved_is_resized_as_the_model_itself_would(format: str) -> None:
    file = io.BytesIO(encode(Image.fromarray(draw_quarters(600, 800)), format))
    whole = Image.fromarray(decode_image(file, 10**7).pixels)
    resized = decode_image(file, 10**7, fit=lambda _h, _w: (420, 560)).pixels
    assert np.array_equal(resized, np.asarray(resize(whole, 560, 420)))


@pytest.mark.parametrize("number", range(4))
def test_image_is_resized_to_the_pixels_of_the_reference(number: int) -> None:
    """Of sizes that Pillow 13 by itself brings to other pixels than Pillow 12 did."""
    with np.load(RESIZED) as file:
        source, expected = file[f"source_{number}"], file[f"resized_{number}"]
    assert len(source) % 28
    picture = io.BytesIO(encode(Image.fromarray(source), "PNG"))
    decoded = decode_image(picture, 10**7, fit=lambda _h, _w: expected.shape[:2])
    assert np.array_equal(decoded.pixels, expected)
