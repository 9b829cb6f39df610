"""Pictures that cost what photos cost to decode."""

import numpy as np
import numpy.typing as npt


def draw_photo(height: int, width: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Slopes, edges and a little grain, as photos have them."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    slopes = np.stack([rows / height, columns / width, (rows + columns) / (height + width)], axis=-1) * 200
    blocks = rng.integers(0, 120, (height // 40 + 1, width // 40 + 1, 3)).repeat(40, 0).repeat(40, 1)[:height, :width]
    return (slopes * 0.6 + blocks + rng.normal(0, 6, (height, width, 3))).clip(0, 240).astype(np.uint8)
