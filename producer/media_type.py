"""Which part a plain reference stands for, told by its suffix alone. Opens nothing."""

from pathlib import PurePosixPath
from urllib.parse import urlsplit

from config.job import ImagePart, VideoPart
from config.wire import InvalidJob

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi"})


def part_of(uri: str) -> ImagePart | VideoPart:
    """`s3://bucket/cat.jpg` is an image, `/clips/1.mp4` a video.

    Raises `InvalidJob` where the suffix does not tell: the caller then gives an `ImagePart` or a `VideoPart`.
    """
    suffix = PurePosixPath(urlsplit(uri).path).suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return ImagePart(uri=uri)
    if suffix in VIDEO_SUFFIXES:
        return VideoPart(uri=uri)
    raise InvalidJob(
        f"1 fault: media: the suffix {suffix!r} tells neither image nor video. Give ImagePart or VideoPart."
    )
