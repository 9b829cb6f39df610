"""How large the frames of a video are shown: many frames share a budget. Decodes and resizes nothing.

`fit_frame` is Preview's rule, `fit_slow_fast` that of 1.5; both are the official utilities' for that variant.
"""

from config.job import VideoPart
from worker.model.image_processing import ImageProcessor, fit_size
from worker.model.visual_input import Size

# The limits of the official utilities, in pixels a frame; a token is 28 x 28 of them.
MIN_FRAME_PIXELS = 128 * 28 * 28
MAX_FRAME_PIXELS = 768 * 28 * 28
VIDEO_PIXELS = 0.9 * 128_000 * 28 * 28

# The same for 1.5, in tokens. A frame like the slow one before it is fast, and gets a share of what that has.
MIN_FRAME_TOKENS = 48
MAX_FRAME_TOKENS = 768
VIDEO_TOKENS = 65536
FAST_SHARE = 0.3


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


def largest_frame(images: ImageProcessor, part: VideoPart, num_frames: int, height: int, width: int) -> Size:
    """1.5: the size to decode frames at before it is known which are slow: no split shows any of them larger."""
    slow, _ = fit_slow_fast(images, part, 1, num_frames - 1, height, width)
    return slow


def fit_slow_fast(
    images: ImageProcessor, part: VideoPart, num_slow: int, num_fast: int, height: int, width: int
) -> tuple[Size, Size]:
    """The sizes of the slow and of the fast frames of a `height` x `width` video. Raises as `fit_frame` does."""
    factor, token = images.factor, images.factor**2
    most = part.max_pixels or MAX_FRAME_TOKENS * token
    least = min(max(part.min_pixels or 0, MIN_FRAME_TOKENS * token), most)
    if part.resized_height is not None and part.resized_width is not None:
        height, width = part.resized_height, part.resized_width
        slow = fit_size(height, width, factor=factor, min_pixels=images.min_pixels, max_pixels=images.max_pixels)
    else:
        share = _slow_share(num_slow, num_fast, least / token, most / token)
        slow = fit_size(height, width, factor=factor, min_pixels=least, max_pixels=int(share * token))
    fast_tokens = max(int(slow[0] * slow[1] / token * FAST_SHARE), MIN_FRAME_TOKENS)
    fast = fit_size(height, width, factor=factor, min_pixels=least, max_pixels=min(fast_tokens * token, most))
    return slow, fast


def _slow_share(num_slow: int, num_fast: int, least: float, most: float) -> float:
    """Tokens a slow frame may have; the first number that bursts the budget, as the utilities' search ends on it."""
    while least < most:
        middle = int(least + most) // 2
        fast = max(int(FAST_SHARE * middle), MIN_FRAME_TOKENS)
        if num_slow * middle + num_fast * fast > VIDEO_TOKENS:
            most = middle
        else:
            least = middle + 1
    return least
