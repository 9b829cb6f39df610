"""What each of the decoders hands back, whichever was chosen."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class FramesRead(NamedTuple):
    """`frames` uint8 [T, H, W, 3] are upright and of the plan's size, `pts` those they really have, in ticks."""

    frames: npt.NDArray[np.uint8]
    pts: list[int]
    num_damaged: int
