"""What comes out of media: pixels and what was learnt while decoding them."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from config.job import VideoPart

# (part, num_frames, height, width) to the (height, width) the model reads frames at: the model's rule, not ours.
FitFrame = Callable[[VideoPart, int, int, int], tuple[int, int]]


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """`image` is RGB, upright, its transparent parts white; `original_size` is (height, width)."""

    image: Image.Image
    original_size: tuple[int, int]

    @property
    def num_bytes(self) -> int:
        return 3 * self.image.width * self.image.height


@dataclass(frozen=True, slots=True)
class DecodedVideo:
    """`frames` is uint8 [T, H, W, 3], upright and of the size `FitFrame` asked for.

    `timestamps_seconds` are the frames' own times from the start of the clip, `fps` how many were read per second of
    the stretch that was asked for, `original_size` (height, width) of an upright frame, `duration_seconds` that of the
    whole clip. `frames_corrupt` counts packets and frames found damaged on the way.
    """

    frames: npt.NDArray[np.uint8]
    timestamps_seconds: tuple[float, ...]
    fps: float
    original_size: tuple[int, int]
    duration_seconds: float
    frames_corrupt: int

    @property
    def num_bytes(self) -> int:
        return self.frames.nbytes
