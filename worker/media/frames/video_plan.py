"""How much of a video is read and how large, solved before anything is decoded. Pure; which frames: `sample_frames`."""

import numpy as np

from keye.config.job import Sampling, VideoPart
from keye.worker.media.decoded import FitFrame, Size, VideoPlan
from keye.worker.media.frames.clip import PacketIndex
from keye.worker.media.frames.sample_frames import MAX_FRAMES, find_stretch, num_asked, rate_asked, spread_frames


def plan_video(index: PacketIndex, part: VideoPart, fit_frame: FitFrame, original_size: Size, name: str) -> VideoPlan:
    """As many frames as `part` asks for, unless the clip has fewer or the model takes fewer."""
    shown_at, pts = index.shown_at, index.pts
    if part.sampling is Sampling.KEYFRAMES and len(index.keyframe_pts):
        are_keyframes = np.isin(pts, index.keyframe_pts)
        shown_at, pts = shown_at[are_keyframes], pts[are_keyframes]
    stretch = find_stretch(shown_at, index.duration_seconds, part, name)
    asked = num_asked(part, stretch.seconds)
    allowed = min(asked, part.max_frames or MAX_FRAMES)
    offered = min(allowed, stretch.num_frames)
    num_frames, size, ample_size = fit_frame(part, offered, *original_size)
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


def tell_thinning(plan: VideoPlan, min_frames_per_second: float) -> str | None:
    """A sentence where frames are left out, and fewer a second are read than were asked for and than the floor."""
    floor = min(min_frames_per_second, plan.fps_asked)
    # Short clips round down to whole frames; what a clip does not have is not left out.
    if plan.fps >= floor or len(plan.wanted) >= min(plan.frames_asked, plan.frames_there):
        return None
    return (
        f"{plan.fps:.3g} frames a second are read, one every {1 / plan.fps:.3g} s; {plan.fps_asked:.3g} were asked for "
        f"and {floor:.3g} should be the least, so {plan.fps / floor:.0%} of the video is covered "
        f"({'; '.join(plan.reasons)}). Send it in stretches with start_seconds and end_seconds."
    )


def _in_words(size: Size) -> str:
    return f"{size[1]} x {size[0]}"
