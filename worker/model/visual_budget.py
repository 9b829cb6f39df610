"""How the context of a job is shared among its media, and images sized by it. Videos: see `frame_budget`."""

from collections.abc import Sequence
from dataclasses import dataclass

from keye.config.job import ImagePart, VideoPart
from keye.worker.model.image_processing import ImageProcessor, fit_size
from keye.worker.model.visual_input import Size


@dataclass(frozen=True, slots=True)
class VisualBudget:
    """Tokens that each image and each video may have."""

    image_tokens: int
    video_tokens: int


def share_context(images: ImageProcessor, parts: Sequence[ImagePart | VideoPart], num_tokens: int) -> VisualBudget:
    """Equal shares for all media; what images cannot use of theirs goes to the videos.

    Decided before any medium is looked at, so images count as if each were as large as it may be.
    """
    share = max(num_tokens, 0) // max(len(parts), 1)
    image_shares = [
        min(share, min(part.max_pixels or images.max_pixels, images.max_pixels) // images.factor**2)
        for part in parts
        if isinstance(part, ImagePart)
    ]
    num_videos = len(parts) - len(image_shares)
    return VisualBudget(share, max(num_tokens - sum(image_shares), 0) // max(num_videos, 1))


def fit_image(images: ImageProcessor, max_tokens: int, part: ImagePart | VideoPart, height: int, width: int) -> Size:
    """The (height, width) that a `height` x `width` image is resized to; `max_tokens` narrows the part's own limits.

    Raises `Fault` for an aspect ratio beyond the model's.
    """
    if part.resized_height is not None and part.resized_width is not None:
        height, width = part.resized_height, part.resized_width
    most = min(part.max_pixels or images.max_pixels, max(max_tokens * images.factor**2, images.min_pixels))
    least = min(part.min_pixels or images.min_pixels, most)
    return fit_size(height, width, factor=images.factor, min_pixels=least, max_pixels=most)
