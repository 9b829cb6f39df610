"""Decoded media as the model takes them, and how much of them it has room for: the two variants differ in videos."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL.Image import Resampling

from keye.config.job import ImagePart, VideoPart
from keye.worker.media.job_media import DecodedImage, DecodedVideo, FitFrame
from keye.worker.model.frame_budget import fit_slow_fast, fit_slow_fast_video, fit_video
from keye.worker.model.frame_similarity import tell_slow_from_fast
from keye.worker.model.visual_budget import VisualBudget, fit_image
from keye.worker.model.visual_input import Image, Size, Video

if TYPE_CHECKING:
    from keye.worker.model.processor import KeyeProcessor


def frame_fitter(processor: "KeyeProcessor", budget: VisualBudget) -> FitFrame:
    """The rule by which the decoder takes and sizes frames and images for this model and job.

    Decoders resize as the released checkpoints ask; images of one that asks otherwise are left to its processor.
    """
    images = processor.image_processor
    fit_frames = fit_slow_fast_video if processor.config.splits_video_into_frames else fit_video

    def fit(part: ImagePart | VideoPart, num_frames: int, height: int, width: int) -> tuple[int, Size, Size]:
        if isinstance(part, VideoPart):
            return fit_frames(images, budget.video_tokens, part, num_frames, height, width)
        size = (height, width)
        if images.resample == Resampling.BICUBIC:
            size = fit_image(images, budget.image_tokens, part, height, width)
        return 1, size, size

    return fit


def visual_inputs(
    processor: "KeyeProcessor",
    parts: Sequence[ImagePart | VideoPart],
    decoded: Sequence[DecodedImage | DecodedVideo],
    budget: VisualBudget,
) -> tuple[list[Image], list[Video]]:
    """The images and the videos of a job, each in the order of its parts."""
    images, videos = [], []
    for part, medium in zip(parts, decoded, strict=True):
        if isinstance(medium, DecodedImage):
            images.append(_image_input(processor, part, medium, budget.image_tokens))
        elif isinstance(part, VideoPart) and processor.config.splits_video_into_frames:
            videos.append(_slow_fast_input(processor, part, medium, budget.video_tokens))
        else:
            videos.append(_video_input(medium))
    return images, videos


def _image_input(
    processor: "KeyeProcessor", part: ImagePart | VideoPart, medium: DecodedImage, max_tokens: int
) -> Image:
    height, width = fit_image(processor.image_processor, max_tokens, part, *medium.original_size)
    return Image(medium.pixels, min_pixels=height * width, max_pixels=height * width, size=(height, width))


def _video_input(medium: DecodedVideo) -> Video:
    height, width = medium.frames.shape[1:3]
    # The decoder has already met the model's size; equal limits keep the processor from resizing again.
    return Video(medium.frames, medium.fps, min_pixels=height * width, max_pixels=height * width)


def _slow_fast_input(processor: "KeyeProcessor", part: VideoPart, medium: DecodedVideo, max_tokens: int) -> Video:
    types = tell_slow_from_fast(medium.frames)
    num_slow, num_fast = types.count(0), types.count(1)
    slow, fast = fit_slow_fast(processor.image_processor, part, num_slow, num_fast, *medium.original_size, max_tokens)
    return Video(
        medium.frames,
        medium.fps,
        size=slow,
        fast_size=fast,
        frame_types=types,
        timestamps=medium.timestamps_seconds,
    )
