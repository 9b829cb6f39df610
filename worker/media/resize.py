"""Resizing pictures to the same pixels whatever Pillow is installed."""

from PIL.Image import Image, Resampling


def resize(picture: Image, width: int, height: int, resample: Resampling = Resampling.BICUBIC) -> Image:
    """The width first, then the height, each rounded to whole grey levels, as the model was trained.

    Pillow did so in one call until release 13, which begins with the cheaper side: up to 20 of 255 away on noise.
    """
    return picture.resize((width, picture.height), resample).resize((width, height), resample)
