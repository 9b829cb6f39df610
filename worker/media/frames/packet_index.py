"""When the frames of a video are shown and which of them are keyframes, learnt from its packets without decoding."""

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from keye.worker.media.frames.container import DEMUX_FAULTS


@dataclass(frozen=True, slots=True)
class PacketIndex:
    """Times are presentation timestamps (pts) in ticks of `time_base`, ascending; `end` is when the last frame ends.

    `hides_frames` when an edit list cuts frames away that are in the file, `has_open_groups` when some frames are shown
    before the keyframe that they follow in the file.
    """

    pts: npt.NDArray[np.int64]
    keyframe_pts: npt.NDArray[np.int64]
    end: int
    time_base: Fraction
    hides_frames: bool
    has_open_groups: bool

    @property
    def shown_at(self) -> npt.NDArray[np.float64]:
        """Seconds from the first frame."""
        return (self.pts - self.pts[0]) * float(self.time_base)

    @property
    def duration_seconds(self) -> float:
        return (self.end - int(self.pts[0])) * float(self.time_base)

    def keyframe_before(self, pts: int) -> int:
        """The latest keyframe shown at or before `pts`, or the first frame where there is none."""
        position = int(np.searchsorted(self.keyframe_pts, pts, side="right"))
        return int(self.keyframe_pts[position - 1] if position else self.pts[0])

    def num_between(self, earlier: int, later: int) -> int:
        """How many frames are shown after `earlier` and before `later`."""
        return int(np.searchsorted(self.pts, later) - np.searchsorted(self.pts, earlier, side="right"))


def index_packets(packets: "Iterable[Packet[VideoStream]]", time_base: Fraction) -> PacketIndex | None:
    """Read all packets of a stream; None where it has no frame. A file that breaks off is indexed up to there.

    Headers are not asked: their frame counts and rates are wrong for variable rates, edit lists and cut-off files.
    """
    durations: dict[int, int] = {}
    keyframes: list[int] = []
    hides_frames = has_open_groups = False
    try:
        for packet in packets:
            pts = presentation_time(packet)
            # An edit list cuts away what it marks as discarded: needed to decode, never shown.
            hides_frames |= packet.is_discard
            if pts is None or packet.size == 0 or packet.is_discard:
                continue
            durations[pts] = packet.duration or 0
            if packet.is_keyframe:
                keyframes.append(pts)
            has_open_groups |= bool(keyframes) and pts < keyframes[-1]
    except DEMUX_FAULTS:
        pass  # cut off or overwritten here; the decoder meets the same place and counts it
    if not durations:
        return None
    pts_of_frames = np.array(sorted(durations), np.int64)
    last = int(pts_of_frames[-1])
    return PacketIndex(
        pts=pts_of_frames,
        keyframe_pts=np.array(sorted(keyframes), np.int64),
        end=last + (durations[last] or _usual_step(pts_of_frames)),
        time_base=time_base,
        hides_frames=hides_frames,
        has_open_groups=has_open_groups,
    )


def presentation_time(timed: "Packet[VideoStream] | VideoFrame") -> int | None:
    """The pts, or where the container stores none (AVI) the dts, which is the same unless frames are reordered."""
    return timed.pts if timed.pts is not None else timed.dts


def _usual_step(pts: npt.NDArray[np.int64]) -> int:
    return int(np.median(np.diff(pts))) if len(pts) > 1 else 1
