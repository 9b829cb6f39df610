"""Which frames of a 1.5 video are slow and which are fast: the official utilities say. They get pixels, never files."""

import numpy as np

from keye.worker.model.frame_budget import MIN_FRAME_TOKENS
from keye.worker.model.image_processing import fit_size

# Frames compared in one call, each as 2.4 MB of floats at most.
_WINDOW = 64


def tell_slow_from_fast(frames: np.ndarray) -> tuple[int, ...]:
    """0 for each slow frame of uint8 [T, H, W, 3], 1 for each fast one: one that is like the latest slow frame."""
    # Imported here because they bring OpenCV and torchvision along, which only videos of 1.5 have a use for.
    import torch
    from keye_vl_utils.vision_process import extract_slow_fast_frames

    if _is_one_row_of_patches(*frames.shape[1:3]):
        return (0,) * len(frames)
    types = [0]
    for start in range(1, len(frames), _WINDOW):
        # What follows depends on the latest slow frame and on nothing before it.
        latest_slow = max(index for index, kind in enumerate(types) if kind == 0)
        window = frames[[latest_slow, *range(start, min(start + _WINDOW, len(frames)))]]
        types += extract_slow_fast_frames(torch.from_numpy(window).permute(0, 3, 1, 2))[1:].tolist()
    return tuple(types)


def _is_one_row_of_patches(height: int, width: int) -> bool:
    """The utilities fail on frames that are this flat when they have shrunk them."""
    return fit_size(height, width, factor=28, min_pixels=MIN_FRAME_TOKENS * 784, max_pixels=256 * 784)[0] == 28
