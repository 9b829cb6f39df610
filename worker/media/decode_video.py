"""One video file to the frames the model reads, at the size it reads them: examined, planned, then read."""

from collections.abc import Callable
from typing import BinaryIO

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from config.job import VideoPart
from worker.media.clip import Clip, damaged, examine_clip
from worker.media.decoded import DecodedVideo, FitFrame, NewPixels, VideoPlan, own_pixels
from worker.media.frame_reader import FrameReader
from worker.media.frames_read import FramesRead
from worker.media.size_limit import check_decoded_bytes
from worker.media.video_plan import plan_video

# As the model's own tools resize; where it shrinks, swscale widens the kernel, so nothing aliases.
_BICUBIC = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP


def decode_video(
    file: BinaryIO,
    name: str,
    part: VideoPart,
    fit_frame: FitFrame,
    max_frame_pixels: int,
    max_decoded_bytes: int,
    on_frame: Callable[[int, int], None] | None = None,
    new_pixels: NewPixels = own_pixels,
) -> DecodedVideo:
    """Sample `file` as `part` asks. Frames are upright; a damaged one is replaced by its neighbour and counted.

    `on_frame` is told the number of frames done and that of all.
    """
    clip = examine_clip(file, name, max_frame_pixels)
    plan = plan_video(clip.index, part, fit_frame, clip.upright_size, name)
    check_decoded_bytes(3 * len(plan.wanted) * plan.size[0] * plan.size[1], max_decoded_bytes, name)
    try:
        read = _read(file, clip, plan, max_frame_pixels, on_frame, new_pixels)
    except av.FFmpegError as error:
        raise damaged(name, clip.format_name, error) from None
    start, tick = int(clip.index.pts[0]), float(clip.index.time_base)
    return DecodedVideo(
        frames=read.frames,
        timestamps_seconds=tuple((pts - start) * tick for pts in read.pts),
        plan=plan,
        original_size=clip.upright_size,
        duration_seconds=clip.index.duration_seconds,
        frames_corrupt=read.num_damaged,
    )


def _read(
    file: BinaryIO,
    clip: Clip,
    plan: VideoPlan,
    max_frame_pixels: int,
    on_frame: Callable[[int, int], None] | None,
    new_pixels: NewPixels,
) -> FramesRead:
    frames = new_pixels((len(plan.wanted), *plan.size, 3))
    height, width = clip.turn(plan.size)
    times = []
    reformatter = VideoReformatter()
    with FrameReader(file, clip.demuxer, clip.name, clip.index, plan.wanted, max_frame_pixels) as reader:
        for position, pts in enumerate(plan.wanted):
            shown = reader.read(pts)
            # One thread: the cores belong to the jobs beside this one.
            resized = reformatter.reformat(shown.frame, width, height, "rgb24", interpolation=_BICUBIC, threads=1)
            frames[position] = np.rot90(resized.to_ndarray(), clip.num_turns)
            times.append(shown.pts)
            if on_frame is not None:
                on_frame(position + 1, len(plan.wanted))
        return FramesRead(frames, times, len(reader.damaged))
