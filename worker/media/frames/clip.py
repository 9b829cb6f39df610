"""A video file before it is planned: opened, its packets indexed, and from one frame its upright size."""

import os
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
from keye.worker.media.frames.time_line import MISSING, Packets, TimeLine, lay_out
from keye.worker.media.limits import check_pixels
from keye.worker.sizing import Size

_BUFFER_BYTES = 256 * 2**10

_PICTURES_BESIDE = Disposition.attached_pic | Disposition.timed_thumbnails
_FOR_FEW = (
    Disposition.hearing_impaired | Disposition.visual_impaired | Disposition.still_image | Disposition.non_diegetic
)

# What demuxing a damaged file may raise. IndexError: PyAV meets a stream that the damage makes appear midway.
DEMUX_FAULTS = (av.FFmpegError, IndexError)

# Where the container tells no times, nobody knows when their frames are shown before they are decoded. FFmpeg, which
# works it out for other codecs, would make it up for these.
_REORDERS_FREELY = ("h264", "hevc", "vvc")
_GEN_PTS = 0x1  # AVFMT_FLAG_GENPTS, which PyAV sets

# Where another stream is chained to the first, its headers come as if they were frames.
_OGG_HEADERS = (b"OVP80", b"\x80theora", b"\x81theora", b"\x82theora")

# Containers round times to their own ticks, the finest being microseconds, or are given what WebM or FLV has rounded.
# Where a frame does not last this many times as long nothing was rounded: in many an AVI a tick is a frame.
_FINEST_TICK_SECONDS = 1e-6
_COARSE_TICK_SECONDS = Fraction(1, 1000)
_MIN_STEP = 3

# A recording in fragments has some a second.
_MAX_BOXES = 100_000

# What lasts longer is damaged.
_MAX_LAST_SECONDS = 30 * 3600


@dataclass(frozen=True, slots=True)
class PacketIndex:
    """Times are presentation timestamps (pts) in ticks of `time_base`, ascending; `end` is when the last frame ends,
    `sizes` how many bytes each frame's packet has.

    `hides_frames` when frames that are in the file are never shown: an edit list cuts them away, or they need what is
    not there. `has_open_groups` when some frames are shown before the keyframe that they follow in the file. `line` has
    the packets' pts where they are not the packets' own.
    """

    pts: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    keyframe_pts: npt.NDArray[np.int64]
    end: int
    time_base: Fraction
    hides_frames: bool
    has_open_groups: bool
    line: TimeLine | None = None

    @property
    def shown_at(self) -> npt.NDArray[np.float64]:
        """Seconds from the first frame; of a steady rate that was rounded, as they were before."""
        seconds = (self.pts - self.pts[0]) * float(self.time_base)
        return np.linspace(0, seconds[-1], len(seconds)) if self._is_rounded_rate() else seconds

    @property
    def rounding_seconds(self) -> float:
        """How far rounding may have moved a frame: half of what it is rounded to, unless one is as short as that."""
        steps = np.diff(self.pts, append=self.end)
        is_rounded = steps.min() < steps.max() and steps.min() >= _MIN_STEP * self._rounding
        return max(self._rounding * float(self.time_base) / 2 if is_rounded else 0.0, _FINEST_TICK_SECONDS)

    @property
    def joined_at(self) -> tuple[float, ...]:
        """Seconds from the first frame at which the clock of the file jumped."""
        line = self.line
        shown = [line.pts[join] for join in line.joins if line.are_shown[join]] if line else []
        return tuple(float((pts - self.pts[0]) * self.time_base) for pts in shown)

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

    @property
    def _rounding(self) -> float:
        """Ticks that times may be rounded to: one, or as many as a millisecond has, where they once were in WebM."""
        return max(1.0, float(_COARSE_TICK_SECONDS / self.time_base))

    def _is_rounded_rate(self) -> bool:
        """Rounding moves a frame by up to once as much, and what lies between two by up to twice."""
        steps, most = np.diff(self.pts), self._rounding
        if not len(steps) or steps.min() == steps.max() or np.ptp(steps) > 2 * most or steps.mean() < _MIN_STEP * most:
            return False
        steady = np.linspace(self.pts[0], self.pts[-1], len(self.pts))
        return bool(np.abs(self.pts - steady).max() <= most)


def index_packets(
    packets: "Iterable[Packet[VideoStream]]", time_base: Fraction, demuxer: str = "mov", rate: Fraction | None = None
) -> PacketIndex | None:
    """Read all packets of a stream; None where it has no frame. A file that breaks off is indexed up to there.

    Headers are not asked: their frame counts and rates are wrong for variable rates, edit lists and cut-off files. Only
    where no packet tells a time are there `rate` frames a second.
    """
    told: list[tuple[int, ...]] = []
    try:
        for packet in packets:
            if size := packet.size:
                presented, decoded = packet.pts, packet.dts
                times = MISSING if presented is None else presented, MISSING if decoded is None else decoded
                told.append((*times, packet.duration or 0, size, packet.is_keyframe, packet.is_discard))
    except DEMUX_FAULTS:
        pass  # cut off or overwritten here; the decoder meets the same place and counts it
    if not told:
        return None
    pts, dts, durations, sizes, keyframes, discarded = np.array(told, np.int64).T
    table = Packets(pts, dts, durations, sizes, keyframes != 0, discarded != 0)
    line = lay_out(table, demuxer, time_base, rate)
    shown = np.flatnonzero(line.are_shown)
    if not len(shown):
        return None
    in_file, are_keyframes = line.pts[shown], table.are_keyframes[shown]
    order = np.argsort(in_file)
    ascending = in_file[order]
    # Before the first keyframe comes none that this could be.
    latest_keyframe = np.maximum.accumulate(np.where(are_keyframes, in_file, ascending[0]))
    last_duration = int(table.durations[shown[order[-1]]])
    usual_step = int(np.median(np.diff(ascending))) if len(ascending) > 1 else 1
    return PacketIndex(
        pts=ascending,
        sizes=table.sizes[shown[order]],
        keyframe_pts=np.sort(in_file[are_keyframes]),
        end=int(ascending[-1]) + (last_duration if 0 < last_duration * time_base < _MAX_LAST_SECONDS else usual_step),
        time_base=time_base,
        hides_frames=len(shown) < len(told),
        has_open_groups=bool(np.any(in_file < latest_keyframe)),
        line=None if line.is_as_stored else line,
    )


def demux(container: InputContainer, stream: VideoStream) -> "Iterator[Packet[VideoStream]]":
    """The packets of a stream, with a pts wherever that is known."""
    codec = stream.codec_context
    if codec.name in _REORDERS_FREELY:
        container.flags &= ~_GEN_PTS
    is_reordered = codec.has_b_frames
    is_ogg = container.format.name == "ogg"
    for packet in container.demux(stream):
        if is_ogg and packet.size and bytes(memoryview(packet)[:7]).startswith(_OGG_HEADERS):
            continue
        if packet.pts is None and not is_reordered:
            packet.pts = packet.dts
        yield packet


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
            packets = first.watch(demux(container, stream))
            index = index_packets(packets, time_base, file_format.demuxer, stream.average_rate)
            codec, look = stream.codec_context.name, look_of(stream, colours, first.frame)
            has_one_track = len(container.streams.video) == 1
    except av.FFmpegError as error:
        if file_format.demuxer == "mov" and not _has_movie_box(file):
            raise corrupt(
                "the recording was not finished, or is cut off: it has no moov box, which tells what is in an MP4 and "
                "is written last. Was there a loss of power, or is it still being written? Send it once it is whole."
            ) from None
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


def _has_movie_box(file: BinaryIO) -> bool:
    """ISO/IEC 14496-12, 4.2: whether one of the boxes on the first level is the one that tells what is in the file."""
    place, end = 0, file.seek(0, os.SEEK_END)
    for _ in range(_MAX_BOXES):
        file.seek(place)
        head = file.read(16)
        if len(head) < 8:
            return False
        if head[4:8] == b"moov":
            return True
        size = int.from_bytes(head[:4]) or end
        place += max(int.from_bytes(head[8:]) if size == 1 else size, 8)
    return True


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
