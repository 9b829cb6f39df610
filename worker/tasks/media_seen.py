"""What the model was shown of each medium, read off the prompt it was given, and where that is too little."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from keye.config.outcome import MediaSeen
from keye.worker.media.frames.video_plan import tell_thinning
from keye.worker.media.job_media import DecodedImage, DecodedVideo
from keye.worker.model.image_processing import ImageProcessor

if TYPE_CHECKING:
    from keye.worker.model.processor import PreparedPrompt


def media_seen(
    decoded: Sequence[DecodedImage | DecodedVideo], prompt: "PreparedPrompt", images: ImageProcessor
) -> tuple[MediaSeen, ...]:
    """One entry a medium, in the order of the job; sizes are (height, width) in pixels."""
    image_grids = iter([] if prompt.image_grid_thw is None else prompt.image_grid_thw.tolist())
    video_grids = iter([] if prompt.video_grid_thw is None else prompt.video_grid_thw.tolist())
    seen = []
    for medium in decoded:
        if isinstance(medium, DecodedImage):
            grids = [next(image_grids)]
        else:
            grids = [next(video_grids)]
            # 1.5 has a grid for each run of frames of one size.
            while sum(grid[0] for grid in grids) < len(medium.frames):
                grids.append(next(video_grids))
        _, rows, columns = grids[0]
        facts = {
            "original_size": medium.original_size,
            "resized_size": (rows * images.patch_size, columns * images.patch_size),
            "visual_tokens": sum(t * h * w for t, h, w in grids) // images.merge_size**2,
        }
        if isinstance(medium, DecodedImage):
            seen.append(MediaSeen(type="image", **facts))
        else:
            seen.append(
                MediaSeen(
                    type="video",
                    frames=len(medium.frames),
                    fps=medium.fps,
                    frames_asked=medium.plan.frames_asked,
                    fps_asked=medium.plan.fps_asked,
                    size_asked=medium.plan.size_asked,
                    reasons=medium.plan.reasons,
                    decoder=medium.decoder,
                    duration_seconds=medium.duration_seconds,
                    frames_corrupt=medium.frames_corrupt,
                    **facts,
                )
            )
    return tuple(seen)


def thinning_warnings(decoded: Sequence[DecodedImage | DecodedVideo], min_frames_per_second: float) -> tuple[str, ...]:
    """A sentence for each video that was read too thinly; see `tell_thinning`."""
    return tuple(
        f"Medium {media_index}: {told}"
        for media_index, medium in enumerate(decoded)
        if isinstance(medium, DecodedVideo) and (told := tell_thinning(medium.plan, min_frames_per_second))
    )
