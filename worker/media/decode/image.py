"""One image file to upright RGB pixels. Sizes for the model are not decided here: see `sizing`."""

import importlib
import importlib.util
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError, features
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile

from keye.config.faults import Fault
from keye.config.formats import FORMATS, format_of_file
from keye.worker.media.decode.salvage import Decoded, Salvaged, salvage, tell
from keye.worker.media.decode.tiff import Tiff
from keye.worker.media.decoded import DecodedImage, NewPixels, own_pixels
from keye.worker.media.faults import corrupt, unsupported
from keye.worker.media.limits import check_pixels
from keye.worker.sizing import Size, resize

# What phones take; a plug-in of Pillow that not every worker has.
_HAS_HEIF = importlib.util.find_spec("pillow_heif") is not None
if _HAS_HEIF:
    import pillow_heif

    # One thread: the cores belong to the decoders beside this one.
    pillow_heif.register_heif_opener(decode_threads=1, thumbnails=False)

# Everything else Pillow can read is rare, or leads to other programs (EPS) and files.
_IS_MISSING = {"AVIF": not features.check("avif"), "HEIF": not _HAS_HEIF}
_FORMATS = [row.name for row in FORMATS if row.media_type == "image" and not _IS_MISSING.get(row.name)]

# Pillow only warns where we refuse, and where we allow more it would refuse: the one limit is ours, checked below.
Image.MAX_IMAGE_PIXELS = None

# EXIF 2.32, tag 0x0112: how the camera was held, and what undoes it.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ON_ITS_SIDE = (5, 6, 7, 8)

# (height, width) of an upright image to the size that the model reads it at; resized as its own tools do, bicubic.
FitImage = Callable[[int, int], Size]


def decode_image(
    file: BinaryIO, max_pixels: int, new_pixels: NewPixels = own_pixels, fit: FitImage | None = None
) -> DecodedImage:
    """Decode the first picture of `file`: EXIF orientation applied, alpha on white, 16 bits scaled to 8.

    Without `fit` it keeps its size. A JPEG that is to be much smaller is decoded at a half, a quarter or an eighth,
    which saves most of the work on a large photo. Notes that are damaged are passed over; of a picture that is, as much
    is read as there is, if that is half of its rows.
    """
    file_format = format_of_file(file)
    name = file_format.name
    target = _Target(max_pixels, new_pixels, fit)
    rows_corrupt, warnings = 0, tuple[str, ...]()
    try:
        rgb = _decode(file, name, target)
    except (Fault, MemoryError):
        raise
    except Exception as error:
        if name not in _FORMATS:
            raise unsupported(
                f"is no image that is decoded here; it looks like {name}. Send {', '.join(_FORMATS)}."
            ) from None
        file.seek(0)
        try:
            salvaged = salvage(file.read(), name, lambda part, ground: _decode_over(part, target, ground))
        except (Fault, MemoryError):
            raise
        except Exception:
            if not isinstance(error, _EndsInGrey):
                raise _damaged(name, error) from (None if _is_meant(error) else error)
            salvaged = Salvaged(error.rgb, share_missing=0.0, is_coarse=False, is_whole=True)
        rgb = salvaged.rgb
        rows_corrupt, warnings = tell(salvaged, name, target.num_rows)
    if target.orientation in _UPRIGHT:
        rgb = rgb.transpose(_UPRIGHT[target.orientation])
    height, width = target.size
    target.pixels[:] = np.asarray(resize(rgb, width, height))
    return DecodedImage(target.pixels, target.original_size, name, rows_corrupt, warnings)


class _Target:
    """What is to become of a picture, once its header is read; `pixels` are asked for once."""

    def __init__(self, max_pixels: int, new_pixels: NewPixels, fit: FitImage | None) -> None:
        self.max_pixels = max_pixels
        self._new_pixels = cache(new_pixels)
        self._fit = fit

    def meet(self, width: int, height: int, orientation: int) -> None:
        """`width` and `height` as stored, within `max_pixels`. Raises `Fault`."""
        self.num_rows = height
        self.orientation = orientation
        self.original_size = _turn((height, width), orientation)
        self.size = self._fit(*self.original_size) if self._fit else self.original_size
        self.pixels = self._new_pixels((*self.size, 3))


@dataclass
class _EndsInGrey(Exception):
    """As libjpeg fills in for missing data, or as the picture does."""

    rgb: Image.Image


def _decode(file: BinaryIO, name: str, target: _Target) -> Image.Image:
    """RGB as stored. Raises whatever Pillow's readers trip over, also where a JPEG looks as if it had been cut off."""
    if name == "TIFF" and (tiff := _tags_of(file)):
        if tiff.is_odd:
            height, width = tiff.size
            check_pixels(width, height, max_pixels=target.max_pixels)
            target.meet(width, height, tiff.orientation)
            return tiff.read_odd()
        if tiff.share_cut:
            raise OSError("image file is truncated")
    rgb = _decode_over(file, target, None).rgb
    # What libjpeg makes of missing data. It tells nobody where the end is marked all the same.
    if name == "JPEG" and (np.asarray(rgb.crop((rgb.width - 1, rgb.height - 8, rgb.width, rgb.height))) == 128).all():
        raise _EndsInGrey(rgb)
    return rgb


def _tags_of(file: BinaryIO) -> Tiff | None:
    try:
        return Tiff(file)
    except struct.error:
        return None
    finally:
        file.seek(0)


def _decode_over(file: BinaryIO, target: _Target, ground: int | None) -> Decoded:
    with Image.open(file, formats=_FORMATS) as image:
        check_pixels(image.width, image.height, target.max_pixels)
        tile = image.tile[0] if image.tile else None
        if ground is not None:
            _put_under(image, ground)
        if image.format == "PNG":
            image.load()  # notes may follow the pixels
        # Pillow turns by orientations in XMP too, which no browser looks at.
        for notes in ("xmp", "XML:com.adobe.xmp", "Raw profile type exif"):
            image.info.pop(notes, None)
        # It turns TIFFs itself, and knows their size then.
        target.meet(image.width, image.height, 1 if image.format == "TIFF" else _orientation(image))
        if isinstance(image, JpegImageFile):
            height, width = _turn(target.size, target.orientation)
            image.draft(None, (width, height))
        try:
            image.load()
        except OSError:
            # libtiff ends with a word on what it could not read, and leaves what it could.
            if ground is None or image.format != "TIFF":
                raise
        if image.format == "PNG" and tile and "transparency" in image.info:
            _match_key(file, image, str(tile.args))
        return Decoded(_to_rgb(image, tile), image, _is_interlaced(image, tile))


def _put_under(image: ImageFile, ground: int) -> None:
    prepare = image.load_prepare

    def prepare_on_ground() -> None:
        prepare()
        num_bands = image.im.bands
        image.im.paste(ground if num_bands == 1 else (ground,) * num_bands, (0, 0, *image.im.size))

    image.load_prepare = prepare_on_ground  # type: ignore[method-assign]


def _is_interlaced(image: Image.Image, tile: Any) -> bool:
    return bool(image.info.get("interlace")) or (image.format == "GIF" and tile is not None and bool(tile.args[1]))


def _is_meant(error: Exception) -> bool:
    """Pillow's readers raise whatever they trip over: struct.error, IndexError... These two are what they mean to
    raise; an OSError with a number is the system's, which may name files of this host."""
    return isinstance(error, SyntaxError) or (isinstance(error, OSError) and error.errno is None)


def _damaged(name: str, error: Exception) -> Fault:
    if isinstance(error, UnidentifiedImageError):
        return corrupt(f"begins like {name}, but is damaged or of a rare kind. Send JPEG or PNG.")
    reason = str(error) if _is_meant(error) else type(error).__name__
    return corrupt(f"the {name} image is damaged or cut off ({reason}).")


def load_readers() -> None:
    """Import what Pillow would import when it meets a format, or colours in LAB, for the first time."""
    Image.init()
    importlib.import_module("PIL.ImageCms")


def _turn(size: Size, orientation: int) -> Size:
    return (size[1], size[0]) if orientation in _ON_ITS_SIDE else size


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        # Damaged camera notes do not spoil the picture; readers of them raise SyntaxError, struct.error and others.
        return 1


def _match_key(file: BinaryIO, image: Image.Image, samples: str) -> None:
    """Which colour is transparent is said in the file's own `samples`; Pillow compares it with those of 8 bits."""
    key = image.info["transparency"]
    if image.mode == "L":
        step = {"L;2": 85, "L;4": 17}.get(samples, 1)
        image.info["transparency"] = key % (255 // step + 1) * step
    elif samples == "RGB":
        image.info["transparency"] = tuple(sample % 256 for sample in key)
    elif samples == "RGB;16B":
        file.seek(0)
        with Image.open(file, formats=["PNG"]) as lower:
            # Taken for little-endian, they are their lower bytes.
            lower.tile = [lower.tile[0]._replace(args="RGB;16L")]
            lower_bytes = np.asarray(lower)
        high, low = np.divmod(key, 256)
        is_key = (np.asarray(image) == high) & (lower_bytes == low)
        image.putalpha(Image.fromarray(np.where(is_key.all(axis=2), 0, 255).astype(np.uint8)))


def _to_rgb(image: Image.Image, tile: Any) -> Image.Image:
    """`tile` is how the file's samples were read, as Pillow has it before it reads them."""
    key = image.info.get("transparency")
    if image.mode.startswith("I"):
        # Pillow clips 16-bit greys at 255 where it should scale them.
        grey = np.asarray(image).astype(np.uint32).clip(0, 65535)
        scaled = ((grey * 255 + 32767) // 65535).astype(np.uint8)
        return Image.fromarray(scaled if key is None else np.where(grey == key, 255, scaled)).convert("RGB")
    if image.format == "BMP" and image.mode == "RGBA" and not image.getchannel("A").getbbox():
        return image.convert("RGB")  # of those who write nothing where alpha might be
    rgb = image
    if image.mode == "La":
        rgb = image = image.convert("LA")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        rgb = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    rgb = rgb if rgb.mode == "RGB" else rgb.convert("RGB")
    if image.format == "GIF" and tile and tile.extents != (0, 0, *image.size):
        canvas = Image.new("RGB", image.size, "white")
        canvas.paste(rgb.crop(tile.extents), tile.extents)
        return canvas
    return rgb
