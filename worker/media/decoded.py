"""What comes out of media: pixels and what was learnt while decoding them."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from keye.worker.sizing import Size

# Memory, uint8 of a shape, that a decoder writes its pixels to.
NewPixels = Callable[[tuple[int, ...]], npt.NDArray[np.uint8]]


def own_pixels(shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """Memory of this process."""
    return np.empty(shape, np.uint8)


@dataclass(frozen=True, slots=True)
class VideoPlan:
    """What will be read of a video, decided from its packets alone, and what had been asked.

    `wanted` are the frames' pts, in order, `fps` is how many of them a second are read of the stretch asked for,
    `frames_there` how many that has to choose from; `reasons` says in sentences why this is not what was asked.
    Where `content` is auto, the plan is what came of it: `frames_still` were left out since nothing had moved, and
    `cuts` were found.
    """

    wanted: tuple[int, ...]
    fps: float
    size: Size
    frames_there: int
    frames_asked: int
    fps_asked: float
    size_asked: Size
    reasons: tuple[str, ...]
    frames_still: int = 0
    cuts: int | None = None


@dataclass(frozen=True, slots=True)
class DecodedImage:
    """`pixels` is uint8 [H, W, 3], upright, its transparent parts white.

    `original_size` is that of the upright file; `pixels` have the size that the model reads. `format` is what the file
    is, `rows_corrupt` how many of the file's rows could not be read, `warnings` are sentences for a person.
    """

    pixels: npt.NDArray[np.uint8]
    original_size: Size
    format: str
    rows_corrupt: int = 0
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DecodedVideo:
    """`frames` is uint8 [T, H, W, 3], upright and of the plan's size.

    `ticks` are the frames' own times from the start of the clip, in the clip's own ticks, each of `tick_seconds`
    (numerator, denominator); `original_size` is (height, width) of an upright frame, `duration_seconds` that of the
    whole clip. `frames_corrupt` counts packets and frames found damaged
    on the way; `decoder` is what decoded the clip, `format` its container; `warnings` are sentences for a person.
    """

    frames: npt.NDArray[np.uint8]
    ticks: tuple[int, ...]
    tick_seconds: tuple[int, int]
    plan: VideoPlan
    original_size: Size
    duration_seconds: float
    frames_corrupt: int
    decoder: str
    format: str
    codec: str
    warnings: tuple[str, ...] = ()

    @property
    def timestamps_seconds(self) -> tuple[float, ...]:
        numerator, denominator = self.tick_seconds
        return tuple(each * numerator / denominator for each in self.ticks)


Decoded = DecodedImage | DecodedVideo
