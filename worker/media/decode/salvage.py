"""What is there of a picture whose file is cut off or damaged, and how much that is.

No decoder tells how far it came. So each file is decoded twice, over black and over white or with other bytes in place
of those that are missing: what comes out otherwise was not read.
"""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from math import ceil
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile

from keye.worker.media.decode.bare_file import BareJpeg, bare_bmp, bare_png, bare_webp
from keye.worker.media.decode.tiff import Tiff
from keye.worker.media.faults import corrupt

_WHITE = 255
# Behind the data of a scan that is whole these bytes are skipped. Where it is not, they are taken for what is missing.
_PROBE = b"\x5a\xa5\x33\xcc\x69\x96" * 16
_PADDINGS = (b"\0", b"\xff", b"\x55", b"\xaa", b"\x33", b"\xcc")
_JPEG_END = b"\xff\xd9"
# Each goes back to a coarser picture (rows, columns) that interlaced PNGs, and by rows GIFs, hold before the finer one.
_COARSER = ((2, 1), (2, 2), (4, 2), (4, 4), (8, 4), (8, 8))

Mask = npt.NDArray[np.bool_]


class Decoded(NamedTuple):
    """A picture as stored: `stored` is what the decoder wrote, `rgb` what that looks like."""

    rgb: Image.Image
    stored: Image.Image
    is_interlaced: bool


# A file to its picture, over a `ground` of 0 or 255 in each sample where one is given.
Decode = Callable[[BinaryIO, int | None], Decoded]


class Salvaged(NamedTuple):
    """`share_missing` is how many of the picture's rows were not read in full."""

    rgb: Image.Image
    share_missing: float
    is_coarse: bool
    is_whole: bool


def salvage(content: bytes, name: str, decode: Decode) -> Salvaged:
    """Read a file that its reader tripped over: without its notes, else as far as it is there.

    Raises what the readers raise, and `ValueError` for a format that is not read in part.
    """
    if name == "JPEG":
        return _salvage_jpeg(content, decode)
    tiff = Tiff(io.BytesIO(content)) if name == "TIFF" else None
    bare = tiff.bare() if tiff else {"PNG": bare_png, "WEBP": bare_webp, "BMP": bare_bmp}.get(name, bytes)(content)
    share_cut = tiff.share_cut if tiff else 0.0
    if not share_cut:
        with suppress(Exception):
            return Salvaged(decode(io.BytesIO(bare), None).rgb, 0.0, False, True)
    if name == "WEBP":
        return _salvage_webp(content, decode)
    if name not in ("PNG", "GIF", "BMP", "TIFF"):
        raise ValueError(f"{name} is not read in part")
    with _as_far_as_it_goes():
        shown, other = (decode(io.BytesIO(bare), ground) for ground in (_WHITE, 0))
    missing = _differing(shown.stored, other.stored)
    pixels = np.array(shown.rgb)
    is_coarse = shown.is_interlaced and bool(missing.any())
    if is_coarse:
        missing = _fill_coarsely(pixels, missing)
    pixels[missing] = _WHITE
    # libtiff does not say what it made up for the end of a strip, but where it holds samples as they are.
    share = _share(missing) if not tiff or tiff.is_plain else max(_share(missing), share_cut)
    return Salvaged(Image.fromarray(pixels), share, is_coarse, False)


def _salvage_jpeg(content: bytes, decode: Decode) -> Salvaged:
    jpeg = BareJpeg(content)
    start = jpeg.head + jpeg.coded
    with _as_far_as_it_goes():
        shown = decode(io.BytesIO(start + _JPEG_END), _WHITE)
        other = decode(io.BytesIO(start + _PROBE + _JPEG_END), 0)
    differing = _differing(shown.stored, other.stored)
    is_coarse = jpeg.has_whole_outline and (bool(differing.any()) or not jpeg.is_finished)
    # From the first that differs on, libjpeg makes up grey for both.
    share = 0.0 if is_coarse or not differing.any() else 1 - _first_row(differing) / len(differing)
    return Salvaged(shown.rgb, share, is_coarse, jpeg.is_finished and not differing.any())


def _salvage_webp(content: bytes, decode: Decode) -> Salvaged:
    decoded: list[Decoded] = []
    for padding in _PADDINGS:
        # Some of them stand for what cannot be.
        with suppress(OSError, EOFError):
            decoded.append(decode(io.BytesIO(bare_webp(content, padding)), None))
        if len(decoded) == 2:
            break
    shown, other = decoded
    differing = _differing(shown.stored, other.stored)
    first = _first_row(differing) if differing.any() else len(differing)
    pixels = np.array(shown.rgb)
    pixels[first:] = _WHITE
    return Salvaged(Image.fromarray(pixels), 1 - first / len(differing), False, False)


@contextmanager
def _as_far_as_it_goes() -> Iterator[None]:
    """Pillow leaves what it cannot read as it was, and says nothing. It knows this for a whole process only."""
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False


def _differing(one: Image.Image, other: Image.Image) -> Mask:
    samples, others = np.asarray(one), np.asarray(other)
    if samples.shape != others.shape:
        raise ValueError("two sizes of one picture")
    differing = samples != others
    return differing if differing.ndim == 2 else differing.any(axis=2)


def _first_row(mask: Mask) -> int:
    return int(mask.any(axis=1).argmax())


def _share(missing: Mask) -> float:
    # Rows are columns where Pillow has turned a TIFF.
    return float(min(missing.any(axis=1).mean(), missing.any(axis=0).mean()))


def _fill_coarsely(pixels: npt.NDArray[np.uint8], missing: Mask) -> Mask:
    """Fills what is missing from the coarser picture, where there is one; returns what is missing still."""
    rows, columns = (np.arange(size) for size in missing.shape)
    for down, across in _COARSER:
        at = np.ix_(rows // down * down, columns // across * across)
        from_there = missing & ~missing[at]
        pixels[from_there] = pixels[at][from_there]
        missing = missing & ~from_there
    return missing


def tell(salvaged: Salvaged, name: str, num_rows: int) -> tuple[int, tuple[str, ...]]:
    """How many of its rows were not read in full, and what to say of it. Raises a fault where it is more than half."""
    rows_corrupt = ceil(salvaged.share_missing * num_rows - 1e-9)
    if 2 * rows_corrupt > num_rows:
        raise corrupt(
            f"the {name} image is damaged or cut off: {rows_corrupt:,} of its {num_rows:,} rows cannot be read, "
            "the limit is half of them. Send an undamaged file."
        )
    start = f"The {name} image is damaged or cut off"
    if rows_corrupt:
        return rows_corrupt, (f"{start}: {rows_corrupt:,} of its {num_rows:,} rows could not be read in full.",)
    if salvaged.is_coarse:
        return 0, (f"{start}: all its rows are there, but some of them coarser than they were.",)
    return 0, () if salvaged.is_whole else (f"{start}, but all its rows could be read.",)
