"""How large media are shown and how many tokens that takes: one rule for the plan, the decoders, the model, the result.

The rules for videos are the official utilities' for each variant, within the tokens that a job's context leaves.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, Self

from PIL.Image import Image, Resampling

from keye.config.codes import ErrorCode
from keye.config.faults import MediumFault

if TYPE_CHECKING:
    from keye.config.job import ImagePart, MediaPart, VideoPart

Size = tuple[int, int]  # height, width in pixels

MAX_ASPECT_RATIO = 200

# The limits of the official utilities for Preview, in pixels a frame; a token is 28 x 28 of them.
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

# More tokens than any rule asks for.
_AMPLE = sys.maxsize


class VideoFit(NamedTuple):
    """How many of the frames offered are shown, at which size, and at which if only the video's own budget counted."""

    num_frames: int
    size: Size
    ample_size: Size


@dataclass(frozen=True, slots=True)
class Sizing:
    """What sizes depend on: the checkpoint, and the tokens that each image and each video of a job may have.

    `factor` pixels of a side become one token; `min_pixels` and `max_pixels` are an image's. Decoders resize as the
    released checkpoints ask; images of one that is not `is_bicubic` are left to its processor. What fits a `height` x
    `width` medium, which is the upright file's size, raises `Fault` for an aspect ratio beyond the model's.
    """

    factor: int
    min_pixels: int
    max_pixels: int
    splits_video_into_frames: bool = False
    is_bicubic: bool = True
    image_tokens: int = _AMPLE
    video_tokens: int = _AMPLE

    def share(self, parts: "Sequence[ImagePart | VideoPart]", num_tokens: int) -> Self:
        """The context shared equally among a job's media; what images cannot use of theirs goes to the videos.

        Decided before any medium is looked at, so images count as if each were as large as it may be.
        """
        share = max(num_tokens, 0) // max(len(parts), 1)
        image_shares = [
            min(share, min(part.max_pixels or self.max_pixels, self.max_pixels) // self.factor**2)
            for part in parts
            if part.type == "image"
        ]
        left = max(num_tokens - sum(image_shares), 0)
        return replace(self, image_tokens=share, video_tokens=left // max(len(parts) - len(image_shares), 1))

    def num_tokens(self, size: Size) -> int:
        return size[0] * size[1] // self.factor**2

    def fit_image(self, part: "MediaPart", height: int, width: int) -> Size:
        """The size that an image is resized to; its share of the context narrows the part's own limits."""
        height, width = part.resized_height or height, part.resized_width or width
        most = min(part.max_pixels or self.max_pixels, max(self.image_tokens * self.factor**2, self.min_pixels))
        least = min(part.min_pixels or self.min_pixels, most)
        return fit_size(height, width, factor=self.factor, min_pixels=least, max_pixels=most)

    def fit_video(self, part: "VideoPart", num_frames: int, height: int, width: int) -> VideoFit:
        """The size and number of `num_frames` frames, before it is known which are slow: smaller first, then fewer.

        No split into slow and fast frames shows any larger than this size.
        """
        ample = replace(self, video_tokens=_AMPLE)
        least, _ = self.fit_frames(part, num_frames, 0, height, width)
        kept = min(num_frames, max(self.video_tokens // (self.num_tokens(least) + self._mark_tokens), 1))
        size, _ = self.fit_frames(part, 1, kept - 1, height, width)
        ample_size, _ = ample.fit_frames(part, 1, num_frames - 1, height, width)
        return VideoFit(kept, size, ample_size)

    def fit_frames(self, part: "VideoPart", num_slow: int, num_fast: int, height: int, width: int) -> tuple[Size, Size]:
        """The sizes that the slow and the fast frames of a video are resized to; Preview has one for both.

        A part's limits only ever narrow the budget, and the context narrows it down to the least size of a frame, and
        no further.
        """
        height, width = part.resized_height or height, part.resized_width or width
        if self.splits_video_into_frames:
            return self._fit_slow_fast(part, num_slow, num_fast, height, width)
        size = self._fit_alike(part, num_slow + num_fast, height, width)
        return size, size

    def most_tokens(self, part: "VideoPart", num_frames: int, height: int, width: int) -> int:
        """The most that `num_frames` frames come to, whichever of them are slow, with the marks around them."""
        least_slow = 1 if self.splits_video_into_frames else num_frames
        return self._mark_tokens * num_frames + max(
            num_slow * self.num_tokens(slow) + (num_frames - num_slow) * self.num_tokens(fast)
            for num_slow in range(least_slow, num_frames + 1)
            for slow, fast in [self.fit_frames(part, num_slow, num_frames - num_slow, height, width)]
        )

    @property
    def _mark_tokens(self) -> int:
        return MARK_TOKENS if self.splits_video_into_frames else 0

    def _fit_alike(self, part: "VideoPart", num_frames: int, height: int, width: int) -> Size:
        """Preview. The checkpoint's own pixel limits hold besides the budget."""
        if part.resized_height:
            least, most = self.min_pixels, self.max_pixels
        else:
            # Twice a frame's share: the utilities count two frames to a temporal patch, and models were trained so.
            share = max(min(MAX_FRAME_PIXELS, VIDEO_PIXELS / num_frames * 2), 1.05 * MIN_FRAME_PIXELS)
            most = min(int(share), self.max_pixels, _most_asked(part) or self.max_pixels)
            # A checkpoint smaller than the utilities' least frame was trained on frames of its own sizes.
            least = MIN_FRAME_PIXELS if self.max_pixels >= MIN_FRAME_PIXELS else self.min_pixels
            least = min(part.min_pixels or least, most)
            most = min(most, max(self.video_tokens * self.factor**2 // num_frames, least))
        return fit_size(height, width, factor=self.factor, min_pixels=least, max_pixels=most)

    def _fit_slow_fast(
        self, part: "VideoPart", num_slow: int, num_fast: int, height: int, width: int
    ) -> tuple[Size, Size]:
        """1.5. `video_tokens` also hold the marks around frames."""
        factor, token = self.factor, self.factor**2
        most = _most_asked(part) or MAX_FRAME_TOKENS * token
        least = min(max(part.min_pixels or 0, MIN_FRAME_TOKENS * token), most)
        if part.resized_height:
            slow = fit_size(height, width, factor=factor, min_pixels=self.min_pixels, max_pixels=self.max_pixels)
        else:
            share = _slow_share(num_slow, num_fast, least / token, most / token, VIDEO_TOKENS)
            room = self.video_tokens - MARK_TOKENS * (num_slow + num_fast)
            if _num_tokens(num_slow, num_fast, share) > room:
                share = max(_slow_share(num_slow, num_fast, least / token, share, room) - 1, least / token)
            slow = fit_size(height, width, factor=factor, min_pixels=least, max_pixels=int(share * token))
        fast_tokens = max(int(self.num_tokens(slow) * FAST_SHARE), MIN_FRAME_TOKENS)
        fast = fit_size(height, width, factor=factor, min_pixels=least, max_pixels=min(fast_tokens * token, most))
        return slow, fast


def fit_size(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> Size:
    """The size an image is resized to: sides are multiples of `factor`, the area stays within the two limits where
    whole factors allow it, the aspect ratio is kept as nearly as that leaves room for.

    Raises `MediumFault` when one side is more than 200 times the other.
    """
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        ratio = max(height, width) / min(height, width)
        raise MediumFault(
            ErrorCode.MEDIA_UNSUPPORTED,
            f"has {width} x {height} pixels, an aspect ratio of {ratio:.0f}; the limit is {MAX_ASPECT_RATIO}. Crop it.",
        )
    if height < factor:
        height, width = factor, round(width * factor / height)
    if width < factor:
        height, width = round(height * factor / width), factor
    fitted_height, fitted_width = round(height / factor) * factor, round(width / factor) * factor
    if fitted_height * fitted_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        fitted_height = max(factor, math.floor(height / shrink / factor) * factor)
        fitted_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif fitted_height * fitted_width < min_pixels:
        stretch = math.sqrt(min_pixels / (height * width))
        fitted_height = math.ceil(height * stretch / factor) * factor
        fitted_width = math.ceil(width * stretch / factor) * factor
    return fitted_height, fitted_width


def resize(picture: Image, width: int, height: int, resample: Resampling = Resampling.BICUBIC) -> Image:
    """To the same pixels whatever Pillow is installed: the width first, then the height, each rounded to whole grey
    levels, as the model was trained.

    Pillow did so in one call until release 13, which begins with the cheaper side: up to 20 of 255 away on noise.
    """
    return picture.resize((width, picture.height), resample).resize((width, height), resample)


def _most_asked(part: "VideoPart") -> int | None:
    return part.max_pixels or (HD_FRAME_PIXELS if part.content == "hd" else None)


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
