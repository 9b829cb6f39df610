"""Decoded media as the model takes them, and the size it wants frames decoded at: the two variants differ in videos."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from config.job import ImagePart, VideoPart
from worker.media.prepare import DecodedImage, DecodedVideo, FitFrame
from worker.model.frame_budget import fit_frame, fit_slow_fast, largest_frame
from worker.model.frame_similarity import tell_slow_from_fast
from worker.model.visual_input import Image, Video

if TYPE_CHECKING:
    from worker.model.processor import KeyeProcessor


def frame_fitter(processor: "KeyeProcessor") -> FitFrame:
    """The rule by which the decoder sizes frames for this model; it can be sent to another process."""
    rule = largest_frame if processor.config.splits_video_into_frames else fit_frame
    return partial(rule, processor.image_processor)


def visual_inputs(
    processor: "KeyeProcessor",
    parts: Sequence[ImagePart | VideoPart],
    decoded: Sequence[DecodedImage | DecodedVideo],
) -> tuple[list[Image], list[Video]]:
    """The images and the videos of a job, each in the order of its parts."""
    images, videos = [], []
    for part, medium in zip(parts, decoded, strict=True):
        if isinstance(medium, DecodedImage):
            images.append(_image_input(part, medium))
        elif isinstance(part, VideoPart) and processor.config.splits_video_into_frames:
            videos.append(_slow_fast_input(processor, part, medium))
        else:
            videos.append(_video_input(medium))
    return images, videos


def _image_input(part: ImagePart | VideoPart, medium: DecodedImage) -> Image:
    size = None
    if part.resized_height is not None and part.resized_width is not None:
        size = (part.resized_height, part.resized_width)
    return Image(medium.image, part.min_pixels, part.max_pixels, size)


def _video_input(medium: DecodedVideo) -> Video:
    height, width = medium.frames.shape[1:3]
    # The decoder has already met the model's size; equal limits keep the processor from resizing again.
    return Video(medium.frames, medium.fps, min_pixels=height * width, max_pixels=height * width)


def _slow_fast_input(processor: "KeyeProcessor", part: VideoPart, medium: DecodedVideo) -> Video:
    types = tell_slow_from_fast(medium.frames)
    slow, fast = fit_slow_fast(processor.image_processor, part, types.count(0), types.count(1), *medium.original_size)
    return Video(
        medium.frames,
        medium.fps,
        size=slow,
        fast_size=fast,
        frame_types=types,
        timestamps=medium.timestamps_seconds,
    )
