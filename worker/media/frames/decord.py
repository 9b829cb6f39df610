"""Frames read by decord, of the clips that it reads rightly. Imports it only when called."""

from typing import BinaryIO

import numpy as np

from keye.worker.media.decoded import VideoPlan
from keye.worker.media.frames.clip import Clip
from keye.worker.media.frames.video_plan import FramesRead, OnFrame, Pixels

# It gives wrong frames of MPEG-TS and HEVC while their times look right, and cannot open AV1.
_WRONG_CONTAINERS = ("mpegts", "mpeg")
_WRONG_CODECS = ("hevc", "av1", "libdav1d")

_BATCH = 16


def read_frames(file: BinaryIO, clip: Clip, plan: VideoPlan, pixels: Pixels, on_frame: OnFrame) -> FramesRead | None:
    """None for clips that decord fails on or is known to read wrongly: edit lists and open groups are not for it."""
    is_known_wrong = clip.demuxer in _WRONG_CONTAINERS or clip.codec in _WRONG_CODECS
    if is_known_wrong or clip.index.hides_frames or clip.index.has_open_groups:
        return None
    from decord import DECORDError, VideoReader

    height, width = plan.size
    try:
        # By its handle: given a file object, decord reads all of it into memory first.
        reader = VideoReader(f"/proc/self/fd/{file.fileno()}", width=width, height=height, num_threads=1)
        if len(reader) != len(clip.index.pts):
            return None
        numbers = np.searchsorted(clip.index.pts, plan.wanted).tolist()
        for start in range(0, len(numbers), _BATCH):
            batch = reader.get_batch(numbers[start : start + _BATCH]).asnumpy()
            pixels[start : start + len(batch)] = batch
            on_frame(start + len(batch), len(numbers))
    except DECORDError:
        return None
    return FramesRead("decord", plan.wanted, num_damaged=0)
