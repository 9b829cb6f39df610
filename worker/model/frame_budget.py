"""How large the frames of a video file are shown: many frames share a budget. Decodes and resizes nothing."""

from config.job import VideoPart
from worker.model.image_processing import ImageProcessor, fit_size
from worker.model.visual_input import Size

# The limits of the official utilities, in pixels a frame; a token is 28 x 28 of them.
MIN_FRAME_PIXELS = 128 * 28 * 28
MAX_FRAME_PIXELS = 768 * 28 * 28
VIDEO_PIXELS = 0.9 * 128_000 * 28 * 28


def fit_frame(images: ImageProcessor, part: VideoPart, num_frames: int, height: int, width: int) -> Size:
    """The (height, width) that `num_frames` frames of a `height` x `width` video are resized to.

    The checkpoint's own pixel limits hold besides the budget, and a part's limits only ever narrow it. Raises
    `UnusableImage` for an aspect ratio beyond the model's.
    """
    if part.resized_height is not None and part.resized_width is not None:
        height, width = part.resized_height, part.resized_width
        least, most = images.min_pixels, images.max_pixels
    else:
        # Twice the share of a frame: the utilities count two frames to a temporal patch, and models were trained so.
        share = max(min(MAX_FRAME_PIXELS, VIDEO_PIXELS / num_frames * 2), 1.05 * MIN_FRAME_PIXELS)
        most = min(int(share), images.max_pixels, part.max_pixels or images.max_pixels)
        # A checkpoint smaller than the utilities' least frame was trained on frames of its own sizes.
        least = MIN_FRAME_PIXELS if images.max_pixels >= MIN_FRAME_PIXELS else images.min_pixels
        least = min(part.min_pixels or least, most)
    return fit_size(height, width, factor=images.factor, min_pixels=least, max_pixels=most)
