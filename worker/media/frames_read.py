"""What passes between `decode_video` and the decoders, whichever was chosen."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

# uint8 [T, H, W, 3] of the plan's size, to be filled with upright frames.
Pixels = npt.NDArray[np.uint8]

# Told the frames done and the frames in all.
OnFrame = Callable[[int, int], None]


class FramesRead(NamedTuple):
    """`pts` are those that the frames really have, in ticks."""

    decoder: str
    pts: Sequence[int]
    num_damaged: int
