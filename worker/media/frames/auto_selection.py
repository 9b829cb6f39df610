"""`content="auto"`: the frames of a clip that begin a scene and those in which something has moved."""

import heapq
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction

import numpy as np
import numpy.typing as npt
from av.video.reformatter import VideoReformatter

from keye.worker.media.decoded import VideoPlan
from keye.worker.media.frames.frame_reader import FrameReader, TimedFrame
from keye.worker.media.frames.picture import Screen
from keye.worker.media.frames.scene_cuts import Cells, CutDetector, average_cells

# A cut is looked for in this many frames a second: where it is, is known as well.
_LOOKS_A_SECOND = 12

# Nothing has moved where no cell of the picture is brighter or darker, or of another colour, by so many of 255 levels.
_COLUMNS, _ROWS = 64, 36
_STILL_LEVELS = 6
# Of what stands still, a frame in so many seconds tells that it lasts.
_STILL_SECONDS = 10.0

# What a frame counts that begins a scene, more than any that does not.
_CUT = 1000.0


class AutoSelection:
    """Fills `pixels` [T, H, W, 3] with T frames at most, each as `screen` shows it.

    Is shown each frame decoded (`watch`) on the way to the evenly spread ones that would be read otherwise. Where there
    are more cuts and moved frames than room, cuts come first, the clearest of them, then what moved most.
    """

    def __init__(self, pixels: npt.NDArray[np.uint8], screen: Screen, time_base: Fraction, first_pts: int) -> None:
        self._num_cuts = self._num_still = 0
        self._pixels, self._screen, self._tick = pixels, screen, float(time_base)
        self._detector = CutDetector()
        self._shrinking = VideoReformatter()
        self._first = first_pts
        self._looked_at: int | None = None
        # The newest frame taken, and a small picture of it.
        self._newest: tuple[int, Cells] | None = None
        # What each frame taken counts, its pts, its place in `pixels`: a heap.
        self._taken: list[tuple[float, int, int]] = []
        self._pts: set[int] = set()

    def watch(self, decoded: TimedFrame) -> None:
        """Each frame, in order. Those before the stretch that was asked for, and damaged ones, are not looked at."""
        if decoded.pts < self._first or decoded.frame.is_corrupt:
            return
        if self._looked_at is not None and self._seconds(self._looked_at, decoded.pts) < 1 / _LOOKS_A_SECOND:
            return
        self._looked_at = decoded.pts
        if clearness := self._detector.clearness(decoded.frame):
            self._num_cuts += 1
            self._take(decoded, _CUT + clearness, average_cells(self._shrinking, decoded.frame, _COLUMNS, _ROWS))

    def fill(
        self, reader: FrameReader, places: Sequence[int], plan: VideoPlan, on_frame: Callable[[int, int], None]
    ) -> VideoPlan:
        """Read through the pts of `places`, in order, those that `plan` wants among them; what came of the plan.

        The first of `pixels` hold its frames then.
        """
        evenly_spread = frozenset(plan.wanted)
        for pts in places:
            shown = reader.read(pts)
            if pts in evenly_spread:
                self._offer(shown)
                on_frame(bisect_right(plan.wanted, pts), len(plan.wanted))
        in_order = sorted((pts, place) for _, pts, place in self._taken)
        _arrange(self._pixels, [place for _, place in in_order])
        still = (f"{self._num_still} frames in which nothing has moved are left out",) if self._num_still else ()
        return replace(
            plan,
            wanted=tuple(pts for pts, _ in in_order),
            fps=plan.fps * len(in_order) / len(plan.wanted),
            reasons=plan.reasons + still,
            frames_still=self._num_still,
            cuts=self._num_cuts,
        )

    def _offer(self, shown: TimedFrame) -> None:
        if shown.pts in self._pts:
            return
        small = average_cells(self._shrinking, shown.frame, _COLUMNS, _ROWS)
        change = 255
        if self._newest is not None:
            pts, before = self._newest
            change = int(np.abs(small - before).max())
            if change < _STILL_LEVELS and 0 <= self._seconds(pts, shown.pts) < _STILL_SECONDS:
                self._num_still += 1
                return
        self._take(shown, change, small)

    def _take(self, taken: TimedFrame, counts: float, small: Cells) -> None:
        self._newest = taken.pts, small
        if len(self._taken) < len(self._pixels):
            place = len(self._taken)
            heapq.heappush(self._taken, (counts, taken.pts, place))
        elif counts > self._taken[0][0]:
            _, pts, place = self._taken[0]
            self._pts.discard(pts)
            heapq.heapreplace(self._taken, (counts, taken.pts, place))
        else:
            return
        self._pts.add(taken.pts)
        self._pixels[place] = self._screen.show(taken.frame)

    def _seconds(self, earlier: int, later: int) -> float:
        return (later - earlier) * self._tick


def _arrange(pixels: npt.NDArray[np.uint8], order: list[int]) -> None:
    """Frame `order[n]` becomes the nth, in place: there may be gigabytes of them."""
    for place, source in enumerate(order):
        while source < place:
            source = order[source]
        if source != place:
            pixels[[place, source]] = pixels[[source, place]]
