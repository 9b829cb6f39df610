"""Whether a plain reference is an image or a video, told by its suffix (or a data URI's own type). Opens nothing."""

from pathlib import PurePosixPath
from typing import Literal

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi"})


def media_type_of(uri: str) -> Literal["image", "video"] | None:
    """`s3://bucket/cat.jpg` is an image, `/clips/1.mp4` a video; None where the reference does not tell."""
    if uri.startswith("data:image/"):
        return "image"
    if uri.startswith("data:video/"):
        return "video"
    suffix = PurePosixPath(uri.partition("?")[0]).suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return "image"
    return "video" if suffix in VIDEO_SUFFIXES else None
