"""One image file to upright RGB pixels. Sizes for the model are not decided here: see `sizing`."""

import importlib.util
from collections.abc import Callable
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError, features
from PIL.JpegImagePlugin import JpegImageFile

from keye.config.faults import Fault
from keye.config.formats import FORMATS, format_of_file
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
    which saves most of the work on a large photo.
    """
    file_format = format_of_file(file)
    try:
        with Image.open(file, formats=_FORMATS) as image:
            check_pixels(image.width, image.height, max_pixels)
            # Pillow turns TIFFs itself.
            orientation = 1 if image.format == "TIFF" else _orientation(image)
            original_size = _turn((image.height, image.width), orientation)
            size = fit(*original_size) if fit else original_size
            pixels = new_pixels((*size, 3))
            if isinstance(image, JpegImageFile):
                height, width = _turn(size, orientation)
                image.draft(None, (width, height))
            image.load()
            rgb = _to_rgb(image)
    except (Fault, MemoryError):
        raise
    except UnidentifiedImageError:
        if file_format.name in _FORMATS:
            raise corrupt(
                f"begins like {file_format.name}, but is damaged or of a rare kind. Send JPEG or PNG."
            ) from None
        raise unsupported(
            f"is no image that is decoded here; it looks like {file_format.name}. Send {', '.join(_FORMATS)}."
        ) from None
    except Exception as error:
        # Pillow's readers raise whatever they trip over: struct.error, IndexError... These two are what they mean to
        # raise; an OSError with a number is the system's, which may name files of this host.
        is_meant = isinstance(error, SyntaxError) or (isinstance(error, OSError) and error.errno is None)
        reason = str(error) if is_meant else type(error).__name__
        fault = corrupt(f"the {file_format.name} image is damaged or cut off ({reason}).")
        raise fault from None if is_meant else error
    if orientation in _UPRIGHT:
        rgb = rgb.transpose(_UPRIGHT[orientation])
    height, width = size
    pixels[:] = np.asarray(resize(rgb, width, height))
    return DecodedImage(pixels, original_size, file_format.name)


def load_readers() -> None:
    """Import what Pillow would import when it meets a format for the first time."""
    Image.init()


def _turn(size: Size, orientation: int) -> Size:
    return (size[1], size[0]) if orientation in _ON_ITS_SIDE else size


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        # Damaged camera notes do not spoil the picture; readers of them raise SyntaxError, struct.error and others.
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow clips 16-bit greys at 255 where it should scale them.
        grey = np.asarray(image).astype(np.uint32).clip(0, 65535)
        return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
