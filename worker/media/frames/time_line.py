"""One line of time for a video whose clock restarts, jumps, lies or tells nothing. Knows only what packets say.

As players do (FFmpeg's `ts_discontinuity_detect`): a clock that goes back has restarted, whatever the container; one
that leaps ahead has jumped only in transport streams and their like, which are recorded and joined as they come.
Elsewhere a picture may stay on screen for as long as it likes.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from keye.worker.media.faults import corrupt

Ticks = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

# FFmpeg's own, of its options -dts_delta_threshold and -dts_error_threshold.
_MAX_GAP_SECONDS = 10
_MAX_TRUSTED_GAP_SECONDS = 30 * 3600
_MAX_STEP_BACK_SECONDS = 0.1

# FFmpeg's demuxers of what has no one clock from start to end; of what stores no decoding times, whose guesses of those
# go back and forth; and of streams without a container, whose times are all made up.
_MAY_JUMP = ("mpegts", "mpeg", "ogg")
_STORES_PTS_ALONE = ("matroska",)
_MAY_STORE_DTS_ALONE = "mxf"
_STORES_NO_TIMES = ("h264", "hevc", "mpegvideo", "m4v", "obu")
# Where several frames are in one pack, it tells the time of one, and FFmpeg may take it for another's.
_SHARES_TIMES = "mpeg"
_NEAR = 8

# What FFmpeg takes for those where the stream itself tells none.
_USUAL_RATE = 25

# FFmpeg's AV_NOPTS_VALUE.
MISSING = int(np.iinfo(np.int64).min)
# What no clock says. Twice as much is still a number.
_MAX_TICKS = 2**60


class Packets(NamedTuple):
    """What the packets that are not empty say of themselves, in the order of the file, times in ticks."""

    pts: Ticks
    dts: Ticks
    durations: Ticks
    sizes: Ticks
    are_keyframes: Flags
    are_discarded: Flags


@dataclass(frozen=True, slots=True)
class TimeLine:
    """For each packet that is not empty, in the order of the file: the pts of its frame on one line of time.

    Those not `are_read` are kept from the decoder: they need what is not there. `joins` are the packets before which
    the clock jumped, `fresh_starts` those of them that are keyframes, where the decoder begins anew. Where most packets
    tell no pts it `counts`: frames are shown in the order in which a decoder hands them out, at these times in theirs.
    """

    pts: Ticks
    are_shown: Flags
    are_read: Flags
    joins: tuple[int, ...]
    fresh_starts: frozenset[int]
    counts: bool
    is_as_stored: bool


def lay_out(packets: Packets, demuxer: str, time_base: Fraction, rate: Fraction | None) -> TimeLine:
    """`rate` is how many frames a second are shown where no packet tells."""
    may_jump = demuxer in _MAY_JUMP
    max_gap = round((_MAX_GAP_SECONDS if may_jump else _MAX_TRUSTED_GAP_SECONDS) / time_base)
    pts, dts = (np.where(np.abs(times) > _MAX_TICKS, MISSING, times) for times in (packets.pts, packets.dts))
    if demuxer in _STORES_PTS_ALONE + _STORES_NO_TIMES:
        dts[:] = MISSING
    if demuxer in _STORES_NO_TIMES or (
        demuxer == _MAY_STORE_DTS_ALONE and np.array_equal(pts, dts) and not packets.are_keyframes.all()
    ):
        pts[:] = MISSING
    pts[(dts != MISSING) & (np.abs(pts - dts) > max_gap)] = MISSING
    stored = pts.copy()
    are_keyframes, are_shown = packets.are_keyframes, ~packets.are_discarded
    num_missing = np.count_nonzero(pts[are_shown] == MISSING)
    counts = bool(2 * num_missing > np.count_nonzero(are_shown)) or (demuxer == _SHARES_TIMES and _repeats(pts))
    durations = packets.durations.clip(0, max_gap)
    steps = np.where(durations > 0, durations, min(round(1 / (rate or _USUAL_RATE) / time_base), max_gap))
    has_dts = bool(np.any(dts != MISSING))
    clock = _fill_in(dts if has_dts else pts, steps, max_gap)
    if counts:
        pts = clock.copy()

    max_step_back = round(_MAX_STEP_BACK_SECONDS / time_base) if has_dts else max_gap
    # What comes before the first keyframe needs what is not there.
    first = int(np.argmax(are_keyframes))
    are_read = np.arange(len(pts)) >= first
    jumps = _find_jumps(clock, steps, max_gap, max_step_back)
    jumps |= _find_restarts(pts, are_keyframes, jumps)
    joins = (np.flatnonzero(jumps[first:]) + first).tolist()
    end_pts = end_clock = None
    for start, stop in zip([first, *joins], [*joins, len(pts)], strict=True):
        here = slice(start, stop)
        is_fresh = bool(are_keyframes[start]) and pts[start] != MISSING
        if is_fresh:
            # They follow a keyframe in the file, are shown before it and need what came before it.
            are_read[here] &= (pts[here] >= pts[start]) | (pts[here] == MISSING)
        if end_pts is not None and end_clock is not None:
            moved = (end_pts - pts[start]) if is_fresh else (end_clock - clock[start])
            pts[here][pts[here] != MISSING] += moved
            clock[here] += moved
        shown = pts[here][are_shown[here] & are_read[here] & (pts[here] != MISSING)]
        if len(shown):
            end_pts, end_clock = int(shown.max() + steps[stop - 1]), int(clock[stop - 1] + steps[stop - 1])
            if end_pts > _MAX_TICKS:
                raise corrupt("its clock jumps so far and so often that it tells no times.")
    hides_some = bool(np.any(are_shown & ~are_read))
    are_shown &= are_read & (pts != MISSING)
    _tell_apart(pts, are_shown)
    return TimeLine(
        pts=pts,
        are_shown=are_shown,
        are_read=are_read,
        joins=tuple(joins),
        fresh_starts=frozenset(join for join in joins if are_keyframes[join]),
        counts=counts,
        is_as_stored=not (joins or counts or hides_some) and np.array_equal(pts[are_shown], stored[are_shown]),
    )


def _repeats(pts: Ticks) -> bool:
    """Whether two packets near to each other tell the same time."""
    known = pts[pts != MISSING]
    return any(bool(np.any(known[apart:] == known[:-apart])) for apart in range(1, _NEAR + 1))


def _fill_in(times: Ticks, steps: Ticks, max_gap: int) -> Ticks:
    """Where times are missing they lie evenly between those known; ahead of the first, behind the last and where
    the clock jumps they go on by `steps`. One told again and again is the first one's alone."""
    passed = np.cumsum(steps) - steps
    known = np.flatnonzero(times != MISSING)
    if not len(known):
        return passed
    known = known[np.diff(times[known], prepend=times[known[0]] - 1) != 0]
    places = np.arange(len(times))
    latest = np.maximum(np.searchsorted(known, places, side="right") - 1, 0)
    following = np.minimum(latest + 1, len(known) - 1)
    gap = times[known[following]] - times[known[latest]]
    num_steps = np.maximum(known[following] - known[latest], 1)
    evenly = times[known[latest]] + gap * (places - known[latest]) // num_steps
    by_steps = times[known[latest]] + passed - passed[known[latest]]
    filled: Ticks = np.where((gap > 0) & (gap <= max_gap) & (places > known[latest]), evenly, by_steps)
    return filled


def _find_jumps(clock: Ticks, steps: Ticks, max_gap: int, max_step_back: int) -> Flags:
    went_on = np.diff(clock)
    return np.concatenate(([False], (went_on < -max_step_back) | (went_on - steps[:-1] > max_gap)))


def _find_restarts(pts: Ticks, are_keyframes: Flags, jumps: Flags) -> Flags:
    """Keyframes shown before an earlier one; of one stretch they never are."""
    are_restarts = np.zeros_like(jumps)
    keyframes = np.flatnonzero(are_keyframes & (pts != MISSING))
    went_back = (np.diff(pts[keyframes]) < 0) & (np.diff(np.cumsum(jumps)[keyframes]) == 0)
    are_restarts[keyframes[1:][went_back]] = True
    return are_restarts


def _tell_apart(pts: Ticks, are_shown: Flags) -> None:
    """Frames of one time follow each other by a tick, in the order of the file: times are what they are known by."""
    shown = np.flatnonzero(are_shown)
    shown = shown[np.argsort(pts[shown], kind="stable")]
    places = np.arange(len(shown))
    pts[shown] = np.maximum.accumulate(pts[shown] - places) + places
