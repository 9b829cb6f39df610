"""Which frames of a video are read. Pure: knows when frames are shown, not how they are decoded."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from keye.config.faults import Fault
from keye.config.job import Content, VideoPart
from keye.config.outcome import ErrorCode

# What the model was trained with: 2 frames a second, from the first frame to the last, at least 4, at most 768.
DEFAULT_FPS = 2.0
MIN_FRAMES = 4
MAX_FRAMES = 768

# The lowest and the highest rate for each kind of content. A long clip is read at the lowest; a short one faster, as
# long as it has fewer frames than the number below.
CONTENT_FPS = {
    Content.ACTION: (15.0, 30.0),
    Content.STATIC: (1.0, 5.0),
    Content.DIALOGUE: (5.0, 10.0),
    Content.HD: (10.0, 15.0),
}
ENOUGH_FRAMES = 32

# Containers round times to their own ticks, the finest being microseconds.
_TICK_SECONDS = 1e-6


class Stretch(NamedTuple):
    """The part of a clip that was asked for: its first and last frame, and its times in seconds."""

    first: int
    last: int
    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start

    @property
    def num_frames(self) -> int:
        return self.last - self.first + 1


def find_stretch(shown_at: npt.NDArray[np.float64], duration_seconds: float, part: VideoPart, name: str) -> Stretch:
    """`shown_at` are the ascending times of all frames in seconds, the first one being 0 or, of keyframes, later."""
    start = part.start_seconds or 0.0
    end = min(part.end_seconds or duration_seconds, duration_seconds)
    if start >= end:
        raise Fault(
            ErrorCode.INVALID_JOB, f"{name}: start_seconds is {start:g}, but the clip ends at {duration_seconds:.3f} s."
        )
    first = _on_screen(shown_at, start)
    last = max(first, int(np.searchsorted(shown_at, end - _TICK_SECONDS)) - 1)
    return Stretch(first, last, start, end)


def rate_asked(part: VideoPart, stretch_seconds: float) -> float:
    """Frames a second that the part asks for: by itself, by what it shows, or as the model was trained."""
    if part.fps is not None:
        return part.fps
    if part.content is not None:
        lowest, highest = CONTENT_FPS[part.content]
        return min(max(ENOUGH_FRAMES / stretch_seconds, lowest), highest)
    return DEFAULT_FPS


def num_asked(part: VideoPart, stretch_seconds: float) -> int:
    """Frames that the part asks for, before any limit."""
    least = MIN_FRAMES if part.fps is None and part.content is None else 1
    return max(round(stretch_seconds * rate_asked(part, stretch_seconds)), least)


def spread_frames(shown_at: npt.NDArray[np.float64], stretch: Stretch, num_frames: int) -> list[int]:
    """The frames on screen at `num_frames` evenly spread times, counted in the order they are shown.

    Where a clip stands still longer than a reading step the same frame is taken again: even steps are what tells the
    model how fast time passes.
    """
    times = np.linspace(
        max(stretch.start, shown_at[stretch.first]), max(stretch.start, shown_at[stretch.last]), num_frames
    )
    return [_on_screen(shown_at, time) for time in times]


def _on_screen(shown_at: npt.NDArray[np.float64], time: float) -> int:
    return max(int(np.searchsorted(shown_at, time + _TICK_SECONDS, side="right")) - 1, 0)
