"""How the context of a job is shared among its media. Which frames and sizes come of it: `frame_budget`."""

from collections.abc import Sequence
from dataclasses import dataclass

from config.job import ImagePart, VideoPart
from worker.model.image_processing import ImageProcessor


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
