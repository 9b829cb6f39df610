"""A video file before it is planned: opened, its packets indexed, and from one frame its upright size."""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from typing import BinaryIO, NoReturn

import av
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from keye.config.formats import format_of_file
from keye.worker.media.faults import MediumFault, corrupt, forbidden, too_large, unsupported
from keye.worker.media.frames.picture import Colours, Look, look_of
from keye.worker.media.limits import check_pixels
from keye.worker.sizing import Size

_BUFFER_BYTES = 256 * 2**10

_PICTURES_BESIDE = Disposition.attached_pic | Disposition.timed_thumbnails
_FOR_FEW = (
    Disposition.hearing_impaired | Disposition.visual_impaired | Disposition.still_image | Disposition.non_diegetic
)

# What demuxing a damaged file may raise. IndexError: PyAV meets a stream that the damage makes appear midway.
DEMUX_FAULTS = (av.FFmpegError, IndexError)


@dataclass(frozen=True, slots=True)
class PacketIndex:
    """Times are presentation timestamps (pts) in ticks of `time_base`, ascending; `end` is when the last frame ends,
    `sizes` how many bytes each frame's packet has.

    `hides_frames` when an edit list cuts frames away that are in the file, `has_open_groups` when some frames are shown
    before the keyframe that they follow in the file.
    """

    pts: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
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
    sizes: dict[int, int] = {}
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
            sizes[pts] = packet.size
            if packet.is_keyframe:
                keyframes.append(pts)
            has_open_groups |= bool(keyframes) and pts < keyframes[-1]
    except DEMUX_FAULTS:
        pass  # cut off or overwritten here; the decoder meets the same place and counts it
    if not durations:
        return None
    pts_of_frames = np.array(sorted(durations), np.int64)
    last = int(pts_of_frames[-1])
    usual_step = int(np.median(np.diff(pts_of_frames))) if len(durations) > 1 else 1
    return PacketIndex(
        pts=pts_of_frames,
        sizes=np.array([sizes[pts] for pts in pts_of_frames.tolist()], np.int64),
        keyframe_pts=np.array(sorted(keyframes), np.int64),
        end=last + (durations[last] or usual_step),
        time_base=time_base,
        hides_frames=hides_frames,
        has_open_groups=has_open_groups,
    )


def presentation_time(timed: "Packet[VideoStream] | VideoFrame") -> int | None:
    """The pts, or where the container stores none (AVI) the dts, which is the same unless frames are reordered."""
    return timed.pts if timed.pts is not None else timed.dts


@dataclass(frozen=True, slots=True)
class Clip:
    """`has_one_track` where no other of its video streams could be meant."""

    format_name: str
    demuxer: str
    codec: str
    index: PacketIndex
    look: Look
    has_one_track: bool

    @property
    def upright_size(self) -> Size:
        return self.look.upright_size

    @property
    def is_plain(self) -> bool:
        """Whether any decoder would find its pictures and show them right."""
        return self.has_one_track and self.look.is_plain


def examine_clip(file: BinaryIO, max_frame_pixels: int) -> Clip:
    """Raises `Fault` for what is no video, holds no frame, or has frames beyond the limit."""
    file_format = format_of_file(file)
    if file_format.demuxer is None:
        raise unsupported(f"is no video that is decoded here; it looks like {file_format.name}. Send MP4 or WebM.")
    try:
        with open_container(file, file_format.demuxer) as container:
            stream = find_video_stream(container)
            check_pixels(stream.width, stream.height, max_frame_pixels)
            colours = Colours.of(stream)
            first = _FirstFrame(stream, max_frame_pixels)
            time_base = stream.time_base or Fraction(1, av.time_base)
            index = index_packets(first.watch(container.demux(stream)), time_base)
            codec, look = stream.codec_context.name, look_of(stream, colours, first.frame)
            has_one_track = len(container.streams.video) == 1
    except av.FFmpegError as error:
        raise damaged(file_format.name, error) from None
    if index is None:
        raise corrupt("holds no frame.")
    if 0 in look.square_size:
        raise corrupt("tells no size that can be, and none of its frames is whole.")
    check_pixels(*look.square_size[::-1], max_frame_pixels)
    return Clip(file_format.name, file_format.demuxer, codec, index, look, has_one_track)


def damaged(format_name: str, error: av.FFmpegError) -> MediumFault:
    if isinstance(error, MemoryError):
        return too_large("takes more memory to decode than a decoder may have. Send a smaller one.")
    return corrupt(f"the {format_name} video is damaged ({error.strerror}).")


class _FirstFrame:
    """Decodes the first frame that can be: only a frame tells how it is cropped and turned, and its colours."""

    def __init__(self, stream: VideoStream, max_pixels: int) -> None:
        self.frame: VideoFrame | None = None
        self._codec = stream.codec_context
        self._codec.options = {"max_pixels": str(max_pixels)}
        self._codec.thread_count = 1
        self._has_begun = False

    def watch(self, packets: "Iterator[Packet[VideoStream]]") -> "Iterator[Packet[VideoStream]]":
        for packet in packets:
            self._has_begun |= packet.is_keyframe
            # Where the keyframe is damaged, those that follow it may be whole.
            if self.frame is None and self._has_begun and packet.size:
                with suppress(av.FFmpegError):
                    frames = self._codec.decode(packet) + (self._codec.decode(None) if packet.is_keyframe else [])
                    self.frame = next(iter(frames), None)
                if packet.is_keyframe:
                    self._codec.flush_buffers()
            yield packet


def open_container(file: BinaryIO, demuxer: str) -> InputContainer:
    """Open `file` from its start with exactly this FFmpeg demuxer; raises `av.FFmpegError` where that fails."""

    def refuse(url: str, flags: int, options: dict[str, str]) -> NoReturn:
        raise forbidden("refers to another file, and only one file is read.")

    file.seek(0)
    # The file's own titles and remarks may be in any encoding.
    return av.open(file, "r", format=demuxer, io_open=refuse, buffer_size=_BUFFER_BYTES, metadata_errors="replace")


def find_video_stream(container: InputContainer) -> VideoStream:
    """The stream that a player plays, of those that can be decoded: see `_rank`. The cover of a song is none."""
    moving = [s for s in container.streams.video if not s.disposition & _PICTURES_BESIDE]
    if not moving:
        raise unsupported("has no video stream. Send a file with moving pictures.")
    decodable = [s for s in moving if s.codec_context is not None]
    if not decodable:
        raise unsupported("its codec is not decoded here. Send H.264, VP9 or AV1.")
    return max(decodable, key=_rank)


def _rank(stream: VideoStream) -> tuple[bool, bool, bool]:
    """As FFmpeg's players choose: made for everybody, marked as default (in MP4: enabled), more than one picture.

    The first of equals.
    """
    disposition = stream.disposition
    return not disposition & _FOR_FEW, bool(disposition & Disposition.default), stream.frames != 1
