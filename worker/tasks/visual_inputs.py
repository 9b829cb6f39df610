"""Decoded media as the model takes them, and what their job's result says of each."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from fractions import Fraction

from keye.config.frame_times import pack_all
from keye.config.job import ImagePart, VideoPart
from keye.config.outcome import MediaSeen
from keye.worker.media.decoded import Decoded, DecodedVideo
from keye.worker.media.faults import name_medium, named
from keye.worker.media.fetch.fetched import Identity
from keye.worker.media.frames.video_plan import tell_thinning
from keye.worker.model.image_processing import Image, Video, frame_types, tell_slow_from_fast
from keye.worker.sizing import Sizing


def visual_inputs(
    sizing: Sizing,
    parts: Sequence[ImagePart | VideoPart],
    identities: Sequence[Identity],
    decoded: Sequence[Decoded],
) -> tuple[list[Image], list[Video], tuple[MediaSeen, ...]]:
    """The images and the videos of a job, each in the order of its parts, and an entry a part for the result."""
    images, videos, seen = [], [], []
    times = _frame_times(decoded)
    for part, identity, medium in zip(parts, identities, decoded, strict=True):
        if isinstance(medium, DecodedVideo):
            assert isinstance(part, VideoPart)
            video, entry = _video_input(sizing, part, medium, next(times))
            videos.append(video)
        else:
            with named(name_medium(part.uri)):
                size = sizing.fit_image(part, *medium.original_size)
            area = size[0] * size[1]
            images.append(Image(medium.pixels, min_pixels=area, max_pixels=area, size=size))
            tokens = sizing.num_tokens(size)
            entry = MediaSeen(
                type="image",
                original_size=medium.original_size,
                resized_size=size,
                visual_tokens=tokens,
                format=medium.format,
                rows_corrupt=medium.rows_corrupt,
                warnings=medium.warnings,
            )
        seen.append(entry.model_copy(update=asdict(identity)))
    return images, videos, tuple(seen)


def media_warnings(decoded: Sequence[Decoded], min_frames_per_second: float) -> tuple[str, ...]:
    """What each medium's decoder warns of, and a sentence for each video read too thinly; see `tell_thinning`."""
    warnings = []
    for media_index, medium in enumerate(decoded):
        told = [*medium.warnings]
        if isinstance(medium, DecodedVideo) and (thinning := tell_thinning(medium.plan, min_frames_per_second)):
            told.append(thinning)
        warnings += [f"Medium {media_index}: {warning}" for warning in told]
    return tuple(warnings)


def _frame_times(decoded: Sequence[Decoded]) -> Iterator[str]:
    """Of each video, in order."""
    return iter(pack_all([(m.ticks, Fraction(*m.tick_seconds)) for m in decoded if isinstance(m, DecodedVideo)]))


def _video_input(sizing: Sizing, part: VideoPart, medium: DecodedVideo, frame_times: str) -> tuple[Video, MediaSeen]:
    plan, frames, fps = medium.plan, medium.frames, medium.plan.fps
    if sizing.splits_video_into_frames:
        types = tell_slow_from_fast(frames)
        slow, fast = sizing.fit_frames(part, types.count(0), types.count(1), *medium.original_size)
        times = medium.timestamps_seconds
        video = Video(frames, fps, size=slow, fast_size=fast, frame_types=types, timestamps=times)
    else:
        slow = fast = plan.size
        # The decoder has already met the model's size; equal limits keep the processor from resizing again.
        area = slow[0] * slow[1]
        video = Video(frames, fps, min_pixels=area, max_pixels=area)
    num_fast = sum(frame_types(video))
    seen = MediaSeen(
        type="video",
        original_size=medium.original_size,
        resized_size=slow,
        visual_tokens=(len(frames) - num_fast) * sizing.num_tokens(slow) + num_fast * sizing.num_tokens(fast),
        frames=len(frames),
        fps=fps,
        duration_seconds=medium.duration_seconds,
        frames_corrupt=medium.frames_corrupt,
        frames_asked=plan.frames_asked,
        fps_asked=plan.fps_asked,
        size_asked=plan.size_asked,
        reasons=plan.reasons,
        decoder=medium.decoder,
        format=medium.format,
        codec=medium.codec,
        content=part.content,
        sampling=part.sampling,
        frame_times=frame_times,
        warnings=medium.warnings,
        frames_still=plan.frames_still,
        cuts=plan.cuts,
    )
    return video, seen
