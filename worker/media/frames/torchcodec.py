"""Frames read by torchcodec in its exact mode. Imports it, and torch with it, only when called."""

import os
import tempfile
from typing import BinaryIO

import numpy as np

from keye.worker.media.decoded import VideoPlan
from keye.worker.media.frames.clip import Clip
from keye.worker.media.frames.video_plan import FramesRead, OnFrame, Pixels

# Frames decoded in one call; between two calls there is news of how far it got.
_BATCH = 16


def read_frames(file: BinaryIO, clip: Clip, plan: VideoPlan, pixels: Pixels, on_frame: OnFrame) -> FramesRead | None:
    """None where torchcodec fails, finds no FFmpeg, or gives other frames than those wanted, as it does for MPEG-TS."""
    # Importing torch asks for a folder for temporary files, and Python looks for one by writing, which no child may.
    tempfile.tempdir = tempfile.tempdir or os.sep
    from torchcodec.decoders import VideoDecoder
    from torchcodec.transforms import Resize

    tick = float(clip.index.time_base)
    file.seek(0)
    try:
        decoder = VideoDecoder(file, dimension_order="NHWC", transforms=[Resize(plan.size)])
        for start in range(0, len(plan.wanted), _BATCH):
            wanted = np.array(plan.wanted[start : start + _BATCH])
            batch = decoder.get_frames_at(np.searchsorted(clip.index.pts, wanted).tolist())
            if not np.array_equal(np.round(batch.pts_seconds.numpy() / tick), wanted):
                return None
            pixels[start : start + len(wanted)] = batch.data.numpy()
            on_frame(start + len(wanted), len(plan.wanted))
    except (RuntimeError, ValueError, IndexError):
        return None
    return FramesRead("torchcodec", plan.wanted, num_damaged=0)
