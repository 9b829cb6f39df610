"""Pictures whose samples are of an unusual kind have the colours that other programs show."""

import io
import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms

from keye.config.codes import ErrorCode
from keye.config.faults import Fault
from keye.worker.media.decode.image import decode_image
from tests.unit.media.test_damaged_notes import chunk
from tests.unit.media.test_decode_image import encode, quarters

HEIGHT, WIDTH = 37, 50
ACROSS = np.linspace(0, 1, WIDTH)[None].repeat(HEIGHT, 0)
DOWN = np.linspace(0, 1, HEIGHT)[:, None].repeat(WIDTH, 1)
COLOURS = np.stack([ACROSS, 0 * ACROSS, 1 - ACROSS], -1)
PARTS = [{}, {"tile": (16, 16)}, {"compression": "zlib"}, {"compression": "zlib", "tile": (16, 16)}]
# From black to white, in each type.
RANGES = {
    **dict.fromkeys(("f2", "f4", "f8"), (0, 1)),
    "u2": (0, 2**16 - 1),
    "u4": (0, 2**32 - 1),
    "i2": (-(2**15), 2**15 - 1),
    "i4": (-(2**31), 2**31 - 1),
    "u1": (0, 255),
}


def of_type(kind: str, values: np.ndarray) -> np.ndarray:
    black, white = RANGES[kind]
    scaled = values * (white - black) + black
    return (scaled if kind[0] == "f" else scaled.round()).astype(kind)


def write_tiff(samples: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, samples, **options)
    return file.getvalue()


def check(content: bytes, expected: np.ndarray) -> None:
    decoded = decode_image(io.BytesIO(content), 10**6)
    expected = expected if expected.ndim == 3 else expected[..., None]
    assert abs(decoded.pixels - expected * 255.0).max() <= 1.5
    assert decoded.warnings == ()


@pytest.mark.holds("docs/model.md#pixels", "Samples of a TIFF")
@pytest.mark.parametrize("kind", RANGES)
@pytest.mark.parametrize("order", "<>")
def test_greys_of_a_tiff_are_from_black_to_white(order: str, kind: str) -> None:
    for parts in PARTS:
        check(write_tiff(of_type(kind, ACROSS), byteorder=order, photometric="minisblack", **parts), ACROSS)
        check(write_tiff(of_type(kind, 1 - ACROSS), byteorder=order, photometric="miniswhite", **parts), ACROSS)
        if "compression" in parts and kind[0] != "f":
            predicted = write_tiff(
                of_type(kind, ACROSS), byteorder=order, photometric="minisblack", predictor=True, **parts
            )
            check(predicted, ACROSS)


@pytest.mark.parametrize("kind", ["u1", "u2", "u4", "f2", "f4", "f8"])
@pytest.mark.parametrize("planes", ["contig", "separate"])
def test_colours_and_alphas_of_a_tiff(kind: str, planes: str) -> None:
    grey_on_white = ACROSS * DOWN + 1 - DOWN
    on_white = COLOURS * DOWN[..., None] + 1 - DOWN[..., None]
    for parts in PARTS:
        for names, samples, extra, expected in (
            ("rgb", COLOURS, [], COLOURS),
            ("rgb", np.dstack([COLOURS, DOWN]), ["unassalpha"], on_white),
            ("rgb", np.dstack([COLOURS * DOWN[..., None], DOWN]), ["assocalpha"], on_white),
            ("rgb", np.dstack([COLOURS, DOWN, DOWN]), [0, 0], COLOURS),
            ("minisblack", np.dstack([ACROSS, DOWN]), ["unassalpha"], grey_on_white),
            ("minisblack", np.dstack([ACROSS * DOWN, DOWN]), ["assocalpha"], grey_on_white),
            ("minisblack", np.dstack([ACROSS, DOWN, DOWN]), [0, 0], ACROSS),
        ):
            written = of_type(kind, samples if planes == "contig" else np.moveaxis(samples, -1, 0))
            options = {"photometric": names, "planarconfig": planes, "extrasamples": extra}
            check(write_tiff(written, **options, **parts), expected)


def test_values_that_are_no_colours_are_black_or_white() -> None:
    samples = np.array([[np.nan, -1, 0, 1, 7, np.inf, -np.inf]], "f4")
    check(write_tiff(samples, photometric="minisblack"), np.array([[0, 0, 0, 1, 1, 1, 0]]))


def test_big_tiff_is_read_as_a_small_one() -> None:
    check(write_tiff(of_type("u2", 1 - ACROSS), photometric="miniswhite", bigtiff=True), ACROSS)


@pytest.mark.parametrize("bits", [10, 12, 14])
@pytest.mark.parametrize("order", "<>")
def test_packed_samples_of_a_tiff(order: str, bits: int) -> None:
    values = (ACROSS * (2**bits - 1)).round().astype(np.int64)
    packed = np.packbits((values[..., None] >> np.arange(bits)[::-1] & 1).reshape(HEIGHT, -1), axis=1).tobytes()
    check(handmade_tiff(order, packed, bits), ACROSS)


@pytest.mark.parametrize("bits", [1, 2, 4, 10, 12])
def test_packed_colours_of_a_tiff(bits: int) -> None:
    most = 2**bits - 1
    values = (COLOURS * most).round().astype(np.int64)
    packed = np.packbits((values[..., None] >> np.arange(bits)[::-1] & 1).reshape(HEIGHT, -1), axis=1).tobytes()
    check(handmade_tiff("<", packed, bits, colours=3), values / most)


def test_floats_stored_as_differences_of_their_bytes() -> None:
    planes = ACROSS.astype(">f4").view(np.uint8).reshape(HEIGHT, WIDTH, 4).swapaxes(1, 2).reshape(HEIGHT, -1)
    differences = np.diff(planes, axis=1, prepend=np.uint8(0)).astype(np.uint8)
    for order in "<>":
        check(
            handmade_tiff(order, zlib.compress(differences.tobytes()), 32, compression=8, predictor=3, form=3), ACROSS
        )


def test_a_tiff_may_tell_the_bits_of_more_samples_than_it_has() -> None:
    for kind in ("u1", "u2"):
        samples = of_type(kind, COLOURS)
        bits = samples.itemsize * 8
        content = write_tiff(samples, photometric="rgb", byteorder="<")
        told = struct.pack("<HHI", 258, 3, 3)
        at = content.index(told)
        told = struct.pack("<HHII", 258, 3, 4, len(content))
        check(content[:at] + told + content[at + len(told) :] + struct.pack("<4H", bits, bits, bits, 1), COLOURS)


def test_sample_of_a_rare_kind_is_refused_in_words() -> None:
    with pytest.raises(Fault, match="24-bit samples of a rare kind") as caught:
        decode_image(io.BytesIO(handmade_tiff("<", bytes(HEIGHT * WIDTH * 3), 24)), 10**6)
    assert caught.value.code is ErrorCode.MEDIA_UNSUPPORTED


def handmade_tiff(
    order: str, strip: bytes, bits: int, *, compression: int = 1, predictor: int = 1, form: int = 1, colours: int = 1
) -> bytes:
    """By the specification, for what no library here writes: one strip of greys, or of three colours."""
    behind = struct.pack(order + "3I", *[bits] * 3)
    start = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "HI", 42, 8 + len(strip + behind)) + strip + behind
    tags = {256: WIDTH, 257: HEIGHT, 258: bits, 259: compression, 262: 1 if colours == 1 else 2, 273: 8, 277: colours}
    tags |= {258: bits if colours == 1 else 8 + len(strip), 278: HEIGHT, 279: len(strip), 317: predictor, 339: form}
    counts = {258: colours}
    entries = b"".join(struct.pack(order + "HHII", tag, 4, counts.get(tag, 1), tags[tag]) for tag in sorted(tags))
    return start + struct.pack(order + "H", len(tags)) + entries + bytes(4)


def png(samples: bytes, bits: int, colours: int, key: tuple[int, ...], width: int, height: int) -> bytes:
    """`samples` are rows with a zero before each."""
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)),
            chunk(b"tRNS", struct.pack(f">{len(key)}H", *key)),
            chunk(b"IDAT", zlib.compress(samples)),
            chunk(b"IEND", b""),
        )
    )


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_key_of_a_grey_png_is_compared_at_its_own_depth(bits: int) -> None:
    most = 2**bits - 1
    greys = np.unique(np.array([0, 1, most // 2, most - 1, most]))
    pixels = np.resize(greys, 16)
    row = np.packbits((pixels[:, None] >> np.arange(bits)[::-1] & 1).astype(np.uint8)).tobytes()
    for key in greys:
        decoded = decode_image(io.BytesIO(png(b"\0" + row, bits, 0, (int(key),), 16, 1)), 1000).pixels[0, :, 0]
        expected = np.where(pixels == key, 255, np.round(pixels * 255 / most))
        assert abs(decoded - expected).max() <= 1


@pytest.mark.parametrize("bits", [8, 16])
def test_key_of_a_coloured_png_is_compared_at_its_own_depth(bits: int) -> None:
    key = (10, 20, 30) if bits == 8 else (10 * 256 + 1, 20 * 256 + 2, 30 * 256 + 3)
    others = [key, (key[0], key[1], key[2] + 1), (key[0], key[1] - 1, key[2])]
    row = b"\0" + np.array(others, f">u{bits // 8}").tobytes()
    decoded = decode_image(io.BytesIO(png(row, bits, 2, key, 3, 1)), 1000).pixels[0]
    assert decoded[0].tolist() == [255, 255, 255]
    assert abs(decoded[1:].astype(int) - [10, 20, 30]).max() <= 1


@pytest.mark.parametrize("is_keyed", [False, True])
def test_around_the_first_picture_of_a_gif_it_is_white(is_keyed: bool) -> None:
    content = bytearray(encode(Image.new("P", (20, 10), 1), "GIF", **({"transparency": 3} if is_keyed else {})))
    at = content.index(b",", 13 + 3 * (2 << (content[10] & 7)))
    content[6:10] = struct.pack("<HH", 60, 40)
    content[at + 1 : at + 5] = struct.pack("<HH", 30, 20)
    content[13:19] = bytes((255, 0, 0, 0, 0, 255))  # red, and blue, which is the background
    content[11] = 1
    pixels = decode_image(io.BytesIO(bytes(content)), 10**4).pixels
    expected = np.full((40, 60, 3), 255)
    expected[20:30, 30:50] = (255, 0, 0)
    assert (pixels == expected).all()


@pytest.mark.parametrize("header_bytes", [56, 108, 124])
def test_alpha_of_a_bmp_counts_where_there_is_any(header_bytes: int) -> None:
    pixels = np.asarray(quarters().convert("RGBA"))[::-1, :, [2, 1, 0, 3]].copy()
    for alpha in (0, 255):
        pixels[..., 3] = alpha
        pixels_read = decode_image(io.BytesIO(bmp(pixels, header_bytes)), 10**5).pixels
        assert (pixels_read == np.asarray(quarters())).all()
    pixels[:10, :, 3] = 0
    assert (decode_image(io.BytesIO(bmp(pixels, header_bytes)), 10**5).pixels[-10:] == 255).all()


def test_alpha_of_a_bmp_of_old_is_none() -> None:
    pixels = np.asarray(quarters().convert("RGBA"))[::-1, :, [2, 1, 0, 3]].copy()
    pixels[..., 3] = np.arange(96)
    assert (decode_image(io.BytesIO(bmp(pixels, 40)), 10**5).pixels == np.asarray(quarters())).all()


def bmp(pixels: np.ndarray, header_bytes: int) -> bytes:
    """Of 32 bits, with a mask for alpha where the header has room for one."""
    height, width, _ = pixels.shape
    compression = 0 if header_bytes == 40 else 3
    header = struct.pack("<IiiHHIIiiII", header_bytes, width, height, 1, 32, compression, pixels.nbytes, 0, 0, 0, 0)
    masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) if compression else b""
    header = (header + masks).ljust(header_bytes, b"\0")
    return struct.pack("<2sIHHI", b"BM", 0, 0, 0, 14 + len(header)) + header + pixels.tobytes()


@pytest.mark.parametrize("header_bytes", [40, 52, 56, 108])
@pytest.mark.parametrize(
    ("bits", "masks"),
    [
        (16, (0xF00, 0xF0, 0xF, 0xF000)),
        (16, (0xE000, 0x1C00, 0x300, 0)),
        (32, (0x3FF00000, 0xFFC00, 0x3FF, 0xC0000000)),
        (32, (0xFF, 0xFF00, 0xFF0000, 0)),
        (32, (0x1F, 0x7E00, 0xFFFF0000, 0)),
    ],
)
def test_any_masks_of_a_bmp_are_followed(bits: int, masks: tuple[int, ...], header_bytes: int) -> None:
    alpha = DOWN if masks[3] and header_bytes >= 56 else 1 + 0 * DOWN
    shown, values = [], np.zeros((HEIGHT, WIDTH + WIDTH % 2), np.uint32)
    for channel, mask in zip((ACROSS, DOWN, 1 - ACROSS, alpha), masks, strict=True):
        lowest = mask & -mask or 1
        stored = (channel * (mask // lowest)).round().astype(np.uint32)
        values[:, :WIDTH] |= stored * np.uint32(lowest)
        shown.append(stored / (mask // lowest or 1) if mask else np.ones_like(channel))
    header = struct.pack("<IiiHHIIiiII", header_bytes, WIDTH, -HEIGHT, 1, bits, 3, 0, 0, 0, 0, 0)
    header = (header + struct.pack("<4I", *masks)[: 12 if header_bytes < 56 else 16]).ljust(header_bytes, b"\0")
    header = struct.pack("<2sIHHI", b"BM", 0, 0, 0, 14 + len(header)) + header
    content = header + values.astype(f"<u{bits // 8}").tobytes()
    shown_alpha = shown[3][..., None] if header_bytes >= 56 else 1
    check(content, np.stack(shown[:3], -1) * shown_alpha + 1 - shown_alpha)
    cut = decode_image(io.BytesIO(content[: -4 * WIDTH]), 10**6)
    assert 0 < cut.rows_corrupt <= 4
    assert (cut.pixels[-1] == 255).all()


@pytest.mark.holds("docs/model.md#pixels", "ICC profiles, gAMA and cHRM are not applied")
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_colours_stay_as_they_are_stored_whatever_notes_say_of_them(format: str) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    # Its red is green, its green red.
    other = srgb.tobytes().replace(b"rXYZ", b"tXYZ").replace(b"gXYZ", b"rXYZ").replace(b"tXYZ", b"gXYZ")
    turned = ImageCms.profileToProfile(quarters(), io.BytesIO(other), srgb)
    assert abs(np.asarray(turned).astype(int) - np.asarray(quarters())).max() > 100
    plain, noted = encode(quarters(), format), encode(quarters(), format, icc_profile=other)
    if format == "PNG":
        linear = chunk(b"gAMA", struct.pack(">I", 100_000))
        wide = chunk(b"cHRM", struct.pack(">8I", 31270, 32900, 70800, 29200, 17000, 79700, 13100, 4600))
        noted = noted[:33] + linear + wide + noted[33:]
    pixels = [decode_image(io.BytesIO(content), 10**6).pixels for content in (plain, noted)]
    assert noted != plain
    assert (pixels[0] == pixels[1]).all()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_in_xmp_alone_is_ignored_as_browsers_do(format: str) -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    if format == "PNG":
        content = encode(quarters(), "PNG")
        notes = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)
        contents = [content[:at] + notes + content[at:] for at in (33, len(content) - 12)]
    else:
        contents = [encode(quarters(), format, **({"tiffinfo": {700: xmp}} if format == "TIFF" else {"xmp": xmp}))]
    for content in contents:
        assert b"tiff:Orientation" in content
        assert decode_image(io.BytesIO(content), 10**6).original_size == (64, 96)
