"""Which frames of a video are read. Pure: knows when frames are shown, not how they are decoded."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from config.error_codes import ErrorCode
from config.job import Content, VideoPart
from worker.media.fault import MediaFault

# What the model was trained with: 2 frames a second, from the first frame to the last, at least 4, at most 768.
DEFAULT_FPS = 2.0
MIN_FRAMES = 4
MAX_FRAMES = 768

CONTENT_FPS = {Content.ACTION: 15.0, Content.STATIC: 1.0, Content.DIALOGUE: 5.0, Content.HD: 10.0}

# Containers round times to their own ticks, the finest being microseconds.
_TICK_SECONDS = 1e-6


class FrameSample(NamedTuple):
    """`indices` count the clip's frames in the order they are shown; `fps` is how many of them a second are read."""

    indices: list[int]
    fps: float


def sample_frames(
    shown_at: npt.NDArray[np.float64], duration_seconds: float, part: VideoPart, name: str
) -> FrameSample:
    """Spread reading times evenly over the stretch asked for and take the frame on screen at each of them.

    `shown_at` are the ascending times of all frames in seconds, the first one being 0. Where a clip stands still longer
    than a reading step the same frame is taken again: even steps are what tells the model how fast time passes.
    """
    start = part.start_seconds or 0.0
    end = min(part.end_seconds or duration_seconds, duration_seconds)
    if start >= end:
        raise MediaFault(
            ErrorCode.INVALID_JOB, f"{name}: start_seconds is {start:g}, but the clip ends at {duration_seconds:.3f} s."
        )
    first = _on_screen(shown_at, start)
    last = max(first, int(np.searchsorted(shown_at, end - _TICK_SECONDS)) - 1)
    num_frames = min(_num_wanted(part, end - start), last - first + 1)
    times = np.linspace(max(start, shown_at[first]), max(start, shown_at[last]), num_frames)
    return FrameSample([_on_screen(shown_at, time) for time in times], num_frames / (end - start))


def _num_wanted(part: VideoPart, stretch_seconds: float) -> int:
    max_frames = part.max_frames or MAX_FRAMES
    fps = part.fps or (CONTENT_FPS[part.content] if part.content else None)
    if fps is None:
        return min(max(round(stretch_seconds * DEFAULT_FPS), MIN_FRAMES), max_frames)
    return min(max(round(stretch_seconds * fps), 1), max_frames)


def _on_screen(shown_at: npt.NDArray[np.float64], time: float) -> int:
    return max(int(np.searchsorted(shown_at, time + _TICK_SECONDS, side="right")) - 1, 0)
