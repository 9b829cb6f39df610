"""Frames read by PyAV and resized while decoding: right on every kind of clip, and salvages damaged ones."""

from typing import BinaryIO

import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from keye.worker.media.decoded import VideoPlan
from keye.worker.media.frames.clip import Clip
from keye.worker.media.frames.frame_reader import FrameReader
from keye.worker.media.frames.video_plan import FramesRead, OnFrame, Pixels

# As the model's own tools resize; where it shrinks, swscale widens the kernel, so nothing aliases.
_BICUBIC = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP


def read_frames(
    file: BinaryIO,
    clip: Clip,
    plan: VideoPlan,
    pixels: Pixels,
    on_frame: OnFrame,
    max_frame_pixels: int,
    num_threads: int,
) -> FramesRead:
    """A damaged frame is replaced by its neighbour. Raises `av.FFmpegError` where the file cannot be opened."""
    height, width = clip.turn(plan.size)
    times = []
    reformatter = VideoReformatter()
    order = clip.index, plan.wanted, max_frame_pixels, num_threads
    with FrameReader(file, clip.demuxer, clip.name, *order) as reader:
        for position, pts in enumerate(plan.wanted):
            shown = reader.read(pts)
            # One thread: the cores belong to the jobs beside this one.
            resized = reformatter.reformat(shown.frame, width, height, "rgb24", interpolation=_BICUBIC, threads=1)
            pixels[position] = np.rot90(resized.to_ndarray(), clip.num_turns)
            times.append(shown.pts)
            on_frame(position + 1, len(plan.wanted))
        return FramesRead("pyav", times, len(reader.damaged))
