"""How large the frames of a video are shown, and how many: they share a budget. Decodes and resizes nothing.

`fit_frame` is Preview's rule, `fit_slow_fast` that of 1.5; both are the official utilities' for that variant, within
the tokens that the job's context leaves. `fit_video` and `fit_slow_fast_video` say how many frames these can hold.
"""

from typing import NamedTuple

from keye.config.job import Content, VideoPart
from keye.worker.model.image_processing import ImageProcessor, fit_size
from keye.worker.model.visual_input import Size

# The limits of the official utilities, in pixels a frame; a token is 28 x 28 of them.
MIN_FRAME_PIXELS = 128 * 28 * 28
MAX_FRAME_PIXELS = 768 * 28 * 28
VIDEO_PIXELS = 0.9 * 128_000 * 28 * 28

# The same for 1.5, in tokens. A frame like the slow one before it is fast, and gets a share of what that has.
MIN_FRAME_TOKENS = 48
MAX_FRAME_TOKENS = 768
VIDEO_TOKENS = 65536
FAST_SHARE = 0.3

# What 1.5 writes around a frame: its mark, up to six figures of its time, two brackets.
MARK_TOKENS = 9

# Frames of `Content.HD` are many, so they are shown reduced.
HD_FRAME_PIXELS = 256 * 28 * 28


class VideoFit(NamedTuple):
    """How many of the frames offered are shown, at which size, and at which if only the video's own budget counted."""

    num_frames: int
    size: Size
    ample_size: Size


def fit_video(
    images: ImageProcessor, max_tokens: int, part: VideoPart, num_frames: int, height: int, width: int
) -> VideoFit:
    """Preview: `num_frames` frames of a `height` x `width` video in at most `max_tokens`: smaller first, then fewer."""
    ample = fit_frame(images, part, num_frames, height, width)
    least = fit_frame(images, part, num_frames, height, width, max_tokens)
    kept = min(num_frames, max(max_tokens * images.factor**2 // (least[0] * least[1]), 1))
    return VideoFit(kept, fit_frame(images, part, kept, height, width, max_tokens), ample)


def fit_slow_fast_video(
    images: ImageProcessor, max_tokens: int, part: VideoPart, num_frames: int, height: int, width: int
) -> VideoFit:
    """1.5: the same before it is known which frames are slow; no split of them shows any larger than this size."""
    ample, _ = fit_slow_fast(images, part, 1, num_frames - 1, height, width)
    least, _ = fit_slow_fast(images, part, num_frames, 0, height, width, max_tokens)
    frame_tokens = least[0] * least[1] // images.factor**2 + MARK_TOKENS
    kept = min(num_frames, max(max_tokens // frame_tokens, 1))
    slow, _ = fit_slow_fast(images, part, 1, kept - 1, height, width, max_tokens)
    return VideoFit(kept, slow, ample)


def fit_frame(
    images: ImageProcessor,
    part: VideoPart,
    num_frames: int,
    height: int,
    width: int,
    max_tokens: int | None = None,
) -> Size:
    """The (height, width) that `num_frames` frames of a `height` x `width` video are resized to.

    The checkpoint's own pixel limits hold besides the budget, and a part's limits only ever narrow it. `max_tokens`
    narrows it down to the least size of a frame, and no further. Raises `Fault` for an aspect ratio beyond the model's.
    """
    if part.resized_height is not None and part.resized_width is not None:
        height, width = part.resized_height, part.resized_width
        least, most = images.min_pixels, images.max_pixels
    else:
        # Twice the share of a frame: the utilities count two frames to a temporal patch, and models were trained so.
        share = max(min(MAX_FRAME_PIXELS, VIDEO_PIXELS / num_frames * 2), 1.05 * MIN_FRAME_PIXELS)
        most = min(int(share), images.max_pixels, _most_asked(part) or images.max_pixels)
        # A checkpoint smaller than the utilities' least frame was trained on frames of its own sizes.
        least = MIN_FRAME_PIXELS if images.max_pixels >= MIN_FRAME_PIXELS else images.min_pixels
        least = min(part.min_pixels or least, most)
        if max_tokens is not None:
            most = min(most, max(max_tokens * images.factor**2 // num_frames, least))
    return fit_size(height, width, factor=images.factor, min_pixels=least, max_pixels=most)


def fit_slow_fast(
    images: ImageProcessor,
    part: VideoPart,
    num_slow: int,
    num_fast: int,
    height: int,
    width: int,
    max_tokens: int | None = None,
) -> tuple[Size, Size]:
    """The sizes of the slow and of the fast frames of a `height` x `width` video. Raises as `fit_frame` does.

    `max_tokens` also holds the marks around frames.
    """
    factor, token = images.factor, images.factor**2
    most = _most_asked(part) or MAX_FRAME_TOKENS * token
    least = min(max(part.min_pixels or 0, MIN_FRAME_TOKENS * token), most)
    if part.resized_height is not None and part.resized_width is not None:
        height, width = part.resized_height, part.resized_width
        slow = fit_size(height, width, factor=factor, min_pixels=images.min_pixels, max_pixels=images.max_pixels)
    else:
        share = _slow_share(num_slow, num_fast, least / token, most / token, VIDEO_TOKENS)
        if max_tokens is not None:
            room = max_tokens - MARK_TOKENS * (num_slow + num_fast)
            if _num_tokens(num_slow, num_fast, share) > room:
                share = max(_slow_share(num_slow, num_fast, least / token, share, room) - 1, least / token)
        slow = fit_size(height, width, factor=factor, min_pixels=least, max_pixels=int(share * token))
    fast_tokens = max(int(slow[0] * slow[1] / token * FAST_SHARE), MIN_FRAME_TOKENS)
    fast = fit_size(height, width, factor=factor, min_pixels=least, max_pixels=min(fast_tokens * token, most))
    return slow, fast


def _most_asked(part: VideoPart) -> int | None:
    return part.max_pixels or (HD_FRAME_PIXELS if part.content is Content.HD else None)


def _num_tokens(num_slow: int, num_fast: int, slow_tokens: float) -> float:
    return num_slow * slow_tokens + num_fast * max(int(FAST_SHARE * slow_tokens), MIN_FRAME_TOKENS)


def _slow_share(num_slow: int, num_fast: int, least: float, most: float, num_tokens: int) -> float:
    """Tokens a slow frame may have; the first number that bursts the budget, as the utilities' search ends on it."""
    while least < most:
        middle = int(least + most) // 2
        if _num_tokens(num_slow, num_fast, middle) > num_tokens:
            most = middle
        else:
            least = middle + 1
    return least
