"""Which frames of a video are read, solved before anything is decoded. Pure: knows when they are shown."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from keye.config.codes import ErrorCode
from keye.config.job import Content, Sampling, VideoPart
from keye.worker.media.decoded import VideoPlan
from keye.worker.media.faults import MediumFault
from keye.worker.media.frames.clip import PacketIndex
from keye.worker.media.frames.scene_cuts import guess_cuts
from keye.worker.sizing import Size, VideoFit

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

# Sums of times are off by less.
_TICK_SECONDS = 1e-6

# A recording may be joined from hundreds.
_MAX_JOINS_TOLD = 3

# (part, frames offered, height, width) to what the model takes of them; see `Sizing.fit_video`.
FitVideo = Callable[[VideoPart, int, int, int], VideoFit]


class Stretch(NamedTuple):
    """The part of a clip that was asked for: its first and last frame, and its times in seconds."""

    first: int
    last: int
    start: float
    end: float

    @property
    def seconds(self) -> float:
        """Never less than a tick: rates are shares of it, and in no time there would be infinitely many frames."""
        return max(self.end - self.start, _TICK_SECONDS)

    @property
    def num_frames(self) -> int:
        return self.last - self.first + 1


def plan_video(index: PacketIndex, part: VideoPart, fit_video: FitVideo, original_size: Size) -> VideoPlan:
    """As many frames as `part` asks for, unless the clip has fewer or the model takes fewer."""
    shown_at, pts, stretch = _sampled(index, part)
    asked = num_asked(part, stretch.seconds)
    allowed = _num_allowed(part, asked)
    offered = min(allowed, stretch.num_frames)
    num_frames, size, ample_size = fit_video(part, offered, *original_size)
    kind = "keyframes" if part.sampling is Sampling.KEYFRAMES else "frames"
    reasons = []
    if allowed < asked:
        by = "max_frames is" if part.max_frames else "the model takes at most"
        reasons.append(f"{by} {allowed}, and {asked} frames were asked for")
    if offered < allowed:
        reasons.append(f"the clip has {offered} {kind} where {allowed} were asked for")
    if size != ample_size:
        reasons.append(f"frames are {_in_words(size)} instead of {_in_words(ample_size)} to fit the context")
    if num_frames < offered:
        reasons.append(f"the context has room for {num_frames} of {offered} frames")
    return VideoPlan(
        wanted=tuple(int(pts[i]) for i in spread_frames(shown_at, stretch, num_frames)),
        fps=num_frames / stretch.seconds,
        size=size,
        frames_there=stretch.num_frames,
        frames_asked=asked,
        fps_asked=rate_asked(part, stretch.seconds),
        size_asked=ample_size,
        reasons=tuple(reasons),
    )


def places_to_look(index: PacketIndex, part: VideoPart, wanted: Sequence[int]) -> list[int]:
    """For `content="auto"`: pts at which the clip is looked at, besides `wanted`. They are as many as would be read of
    it were there no `max_frames` and all of the context, so that no small budget makes cuts hard to find."""
    shown_at, pts, stretch = _sampled(index, part)
    num_places = min(num_asked(part, stretch.seconds), MAX_FRAMES, stretch.num_frames)
    places = {*wanted, *(int(pts[i]) for i in spread_frames(shown_at, stretch, num_places))}
    if part.sampling is not Sampling.KEYFRAMES:
        # What lies between places that are near to each other is mostly decoded anyway.
        most = num_places if stretch.seconds > num_places else num_places // 4
        places |= {int(pts[i]) for i in guess_cuts(index, stretch.first, stretch.last, most)}
    return sorted(places)


def fit_of(plan: VideoPlan, part: VideoPart, fit_video: FitVideo, original_size: Size) -> VideoFit:
    """What `plan_video` has fitted, of a clip that is what `plan` says."""
    offered = max(min(_num_allowed(part, plan.frames_asked), plan.frames_there), 1)
    return fit_video(part, offered, *original_size)


def is_of_rule(plan: VideoPlan, part: VideoPart, fit_video: FitVideo, original_size: Size) -> bool:
    """Whether `plan` takes as many frames, and as large ones, as `plan_video` would of a clip that is what it says."""
    fit = fit_of(plan, part, fit_video, original_size)
    least = 1 if part.content is Content.AUTO else fit.num_frames
    return least <= len(plan.wanted) <= fit.num_frames and fit[1:] == (plan.size, plan.size_asked)


def tell_thinning(plan: VideoPlan, min_frames_per_second: float) -> str | None:
    """A sentence where frames are left out, and fewer a second are read than were asked for and than the floor."""
    floor = min(min_frames_per_second, plan.fps_asked)
    # One in which nothing has moved is as good as read.
    num_covered = len(plan.wanted) + plan.frames_still
    fps = plan.fps * num_covered / len(plan.wanted)
    # Short clips round down to whole frames; what a clip does not have is not left out.
    if fps >= floor or num_covered >= min(plan.frames_asked, plan.frames_there):
        return None
    return (
        f"{fps:.3g} frames a second are read, one every {1 / fps:.3g} s; {plan.fps_asked:.3g} were asked for "
        f"and {floor:.3g} should be the least, so {fps / floor:.0%} of the video is covered "
        f"({'; '.join(plan.reasons)}). Send it in stretches with start_seconds and end_seconds."
    )


def tell_joins(index: PacketIndex) -> tuple[str, ...]:
    """A sentence where the clock of the file jumps, which says when that is on the line of time that goes on."""
    joined_at = index.joined_at
    if not joined_at:
        return ()
    told = ", ".join(f"{seconds:.3f} s" for seconds in joined_at[:_MAX_JOINS_TOLD])
    more = f" and {len(joined_at) - _MAX_JOINS_TOLD} more" if len(joined_at) > _MAX_JOINS_TOLD else ""
    return (
        f"The clock of the file jumps at {told}{more}, as where recordings were joined. Times go on without a gap.",
    )


def find_stretch(
    shown_at: npt.NDArray[np.float64],
    duration_seconds: float,
    part: VideoPart,
    rounding_seconds: float = _TICK_SECONDS,
) -> Stretch:
    """`shown_at` are the ascending times of all frames in seconds, the first one being 0 or, of keyframes, later.

    A frame that is as near as `rounding_seconds` to the start is on screen there, one so near to the end is not.
    """
    start = part.start_seconds or 0.0
    end = min(part.end_seconds or duration_seconds, duration_seconds)
    if start >= end:
        raise MediumFault(
            ErrorCode.INVALID_JOB, f"start_seconds is {start:g}, but the clip ends at {duration_seconds:.3f} s."
        )
    first = _on_screen(shown_at, start, rounding_seconds)
    last = max(first, int(np.searchsorted(shown_at, end - rounding_seconds)) - 1)
    return Stretch(first, last, start, end)


def rate_asked(part: VideoPart, stretch_seconds: float) -> float:
    """Frames a second that the part asks for: by itself, by what it shows, or as the model was trained."""
    if part.fps is not None:
        return part.fps
    if part.content in CONTENT_FPS:
        lowest, highest = CONTENT_FPS[part.content]
        return min(max(ENOUGH_FRAMES / stretch_seconds, lowest), highest)
    return DEFAULT_FPS


def num_asked(part: VideoPart, stretch_seconds: float) -> int:
    """Frames that the part asks for, before any limit."""
    least = MIN_FRAMES if part.fps is None and part.content not in CONTENT_FPS else 1
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


def _on_screen(shown_at: npt.NDArray[np.float64], time: float, rounding_seconds: float = _TICK_SECONDS) -> int:
    return max(int(np.searchsorted(shown_at, time + rounding_seconds, side="right")) - 1, 0)


def _sampled(index: PacketIndex, part: VideoPart) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64], Stretch]:
    """The seconds and the pts of the frames that may be read, and the stretch of them that was asked for."""
    shown_at, pts = index.shown_at, index.pts
    if part.sampling is Sampling.KEYFRAMES and len(index.keyframe_pts):
        are_keyframes = np.isin(pts, index.keyframe_pts)
        shown_at, pts = shown_at[are_keyframes], pts[are_keyframes]
    return shown_at, pts, find_stretch(shown_at, index.duration_seconds, part, index.rounding_seconds)


def _num_allowed(part: VideoPart, asked: int) -> int:
    return min(asked, part.max_frames or MAX_FRAMES)


def _in_words(size: Size) -> str:
    return f"{size[1]} x {size[0]}"
