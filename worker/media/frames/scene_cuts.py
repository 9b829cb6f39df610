"""Where a clip cuts from one scene to another: seen in decoded frames, and guessed from the sizes of packets."""

from collections import deque
from statistics import median

import numpy as np
import numpy.typing as npt
from av.video.frame import VideoFrame
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter

from keye.worker.media.frames.clip import PacketIndex

Cells = npt.NDArray[np.float32]  # [3, rows, columns]: brightness and two colours, 0 to 255, of a frame as it is stored

_COLUMNS, _ROWS = 32, 18

# A cut changes brightness and colours by so many levels, and what lies where; light that flickers changes levels alone.
_MIN_CHANGE, _MAX_LIKENESS = 12.0, 0.85
# Unless nothing is alike, it changes them so many times as much as the frames before it do, which may move fast.
_MIN_TIMES_USUAL, _NO_LIKENESS = 3.0, 0.5
# Below so many levels of contrast there is nothing to lie anywhere: only how sudden a change is, and by how much, tells
# a cut from a fade.
_FLAT, _MIN_FLAT_CHANGE = 2.0, 24.0
# What is usual is the median of so many: no cut among them changes that.
_NUM_USUAL = 5

# A frame of another scene takes so many times the bytes of any other this near to it.
_MIN_TIMES_NEAR = 2.0
_NEAR = 16


class CutDetector:
    """Is shown the frames that a decoder gives, in order; those that it left out may be among them or not.

    The rule is that of PySceneDetect's adaptive detector, on brightness and colours of a small picture, and on how
    alike two of them are (the correlation of their brightness).
    """

    def __init__(self) -> None:
        self._shrinking = VideoReformatter()
        self._before: Cells | None = None
        self._changes: deque[float] = deque(maxlen=_NUM_USUAL)

    def clearness(self, frame: VideoFrame) -> float:
        """Of the cut before `frame`, the greater the clearer; 0 where there is none."""
        cells = average_cells(self._shrinking, frame, _COLUMNS, _ROWS)
        before, self._before = self._before, cells
        if before is None:
            return 0.0
        change = float(np.abs(cells - before).sum()) / (_ROWS * _COLUMNS)
        is_sudden = bool(self._changes) and change >= _MIN_TIMES_USUAL * median(self._changes)
        self._changes.append(change)
        if change < _MIN_CHANGE:
            return 0.0
        likeness = _likeness(before[0], cells[0])
        if likeness is None:
            return change if is_sudden and change >= _MIN_FLAT_CHANGE else 0.0
        return change * (1 - likeness) if likeness <= (_MAX_LIKENESS if is_sudden else _NO_LIKENESS) else 0.0


def average_cells(reformatter: VideoReformatter, frame: VideoFrame, columns: int, rows: int) -> Cells:
    """The frame as so many cells, in which the grain of a film and a camera's noise are gone."""
    # One that keeps its colours as they are, of those that swscale knows.
    kept = Colorspace.ITU601
    small = reformatter.reformat(
        frame,
        columns,
        rows,
        "yuv444p",
        src_colorspace=kept,
        dst_colorspace=kept,
        interpolation=Interpolation.AREA,
        threads=1,
    )
    return small.to_ndarray().astype(np.float32)


def _likeness(before: npt.NDArray[np.float32], after: npt.NDArray[np.float32]) -> float | None:
    before, after = before - before.mean(), after - after.mean()
    contrast = float(np.sqrt((before**2).mean() * (after**2).mean()))
    return float((before * after).mean()) / contrast if contrast > _FLAT else None


def guess_cuts(index: PacketIndex, first: int, last: int, most: int) -> list[int]:
    """Frames from `first` to `last` that may begin a scene, `most` at most, in order, as their packets' sizes have it.

    For what a decoder skips: a guess costs the frames up to it, and only the pictures tell whether it is right.
    """
    sizes = index.sizes.astype(np.float64)
    are_keys = np.isin(index.pts, index.keyframe_pts)
    evidence = _changes_of_size(sizes) if are_keys.all() else _leaps_of_size(sizes, are_keys)
    evidence = evidence[first : last + 1]
    ranked = np.argsort(-evidence, kind="stable")[:most]
    return sorted(int(position) + first for position in ranked if evidence[position] >= _MIN_TIMES_NEAR)


def _changes_of_size(sizes: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Where each frame is coded for itself: how many times as much as usual it differs from the one before it."""
    changes = np.abs(np.diff(np.log(np.maximum(sizes, 1)), prepend=np.log(max(sizes[0], 1))))
    return changes / (np.median(changes) + 0.01)


def _leaps_of_size(sizes: npt.NDArray[np.float64], are_keys: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """How many times as large each frame is as any near it; a keyframe only counts where it comes out of turn."""
    between = np.where(are_keys, 0, sizes)
    largest_near = np.ones(len(sizes))
    for shift in range(1, _NEAR + 1):
        largest_near[shift:] = np.maximum(largest_near[shift:], between[:-shift])
        largest_near[:-shift] = np.maximum(largest_near[:-shift], between[shift:])
    evidence = sizes / largest_near
    keys = np.flatnonzero(are_keys)
    turns = np.diff(keys, prepend=-1)
    evidence[keys[turns >= turns.max(initial=0)]] = 0
    return evidence
