"""What a prompt can show the model: decoded pixels and how large to show them. Values only."""

from dataclasses import dataclass

import numpy as np
import PIL.Image

Size = tuple[int, int]  # height, width in pixels


@dataclass(frozen=True, eq=False)
class Image:
    """One picture: RGB of any PIL mode, or uint8 [H, W, 3]. Limits left out are the checkpoint's own."""

    pixels: PIL.Image.Image | np.ndarray
    min_pixels: int | None = None
    max_pixels: int | None = None
    size: Size | None = None
    """Shown as if it had this size; the rule for sizes still rounds and limits it."""


@dataclass(frozen=True, eq=False)
class Video:
    """The sampled frames of one video, uint8 [T, H, W, 3], in time order."""

    frames: np.ndarray
    fps: float = 2.0
    """Sampled frames a second. Preview's clock runs on it; 1.5 reads `timestamps` instead."""
    min_pixels: int | None = None
    max_pixels: int | None = None
    size: Size | None = None
    """Preview: as for an image. 1.5: the exact size of slow frames, both sides multiples of 28."""
    fast_size: Size | None = None
    """1.5 only: the exact size of fast frames."""
    frame_types: tuple[int, ...] | None = None
    """1.5 only: 0 for a slow frame, 1 for a fast one; all slow when left out."""
    timestamps: tuple[float, ...] | None = None
    """1.5 only: seconds from the start, one a frame; left out of the prompt when left out here."""
