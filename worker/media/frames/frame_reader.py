"""Reads chosen frames of a video in order: decodes forward, and seeks where that skips enough decoding."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, dropwhile
from typing import BinaryIO, NamedTuple

import av
import numpy as np
from av.codec.context import ThreadType
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from keye.worker.media.faults import corrupt
from keye.worker.media.frames.clip import DEMUX_FAULTS, Clip, demux, find_video_stream, open_container
from keye.worker.media.frames.picture import decoder_of

# A seek empties the decoder's pipeline, which costs about as much as decoding this many frames.
_MIN_FRAMES_SKIPPED = 16

# Where a container keeps no exact index (MPEG-TS keeps none) a seek may land behind its target: step back further.
_BACK_OFF_SECONDS = (0, 1, 2, 4)

# Here a frame that no other refers to can be left out by its packet, which saves about 40 % of decoding H.264.
# MPEG-TS may spread the two fields of an interlaced frame over two packets; AV1's decoder leaves out the wrong frames.
_ONE_PACKET_A_FRAME = ("mov", "matroska")
_LEAVES_OUT_BY_PACKET = ("h264", "hevc")


class TimedFrame(NamedTuple):
    pts: int
    frame: VideoFrame


class FrameReader:
    """Reads the frames at `wanted` pts and no others; `close` it.

    `damaged` holds the pts of the packets and frames found damaged so far; `num_threads` 0 is a thread a core;
    `on_decoded` is called with each frame decoded, also those on the way to a wanted one, in order.
    """

    _frames: Iterator[TimedFrame]
    # The latest frame decoded, or just before the first that will be.
    _position: int

    def __init__(
        self,
        file: BinaryIO,
        clip: Clip,
        wanted: Sequence[int],
        max_pixels: int,
        num_threads: int = 0,
        on_decoded: Callable[[TimedFrame], None] | None = None,
    ) -> None:
        self.damaged: set[int | None] = set()
        self._file, self._clip, self._index, self._line = file, clip, clip.index, clip.index.line
        self._counts = self._line is not None and self._line.counts
        self._wanted = frozenset(wanted)
        # Keyframes need no other frame: what lies between them is handed to the decoder only if none of them is whole.
        self._reads_keyframes_only = not self._counts and self._wanted <= frozenset(clip.index.keyframe_pts.tolist())
        self._max_pixels, self._num_threads = max_pixels, num_threads
        self._on_decoded = on_decoded
        self._before: TimedFrame | None = None
        self._newest: TimedFrame | None = None
        self._start()

    def close(self) -> None:
        self._container.close()

    def read(self, pts: int) -> TimedFrame:
        """The frame shown at `pts`, one of those wanted, which must not go back from call to call.

        Where it is damaged, the frame before it; where there is none before, the one after.
        """
        keyframe = self._index.keyframe_before(pts)
        if not self._counts and self._index.num_between(self._position, keyframe) >= _MIN_FRAMES_SKIPPED:
            self._seek(keyframe)
        while self._position < pts and (decoded := next(self._frames, None)):
            self._before, self._newest = self._newest, decoded
            self._position = decoded.pts
            if self._on_decoded:
                self._on_decoded(decoded)
        shown = self._newest if self._position <= pts or self._before is None else self._before
        if shown is None and self._reads_keyframes_only:
            self._reads_keyframes_only = False
            self._container.close()
            self._start()
            return self.read(pts)
        if shown is None:
            raise corrupt("none of its frames can be decoded.")
        return shown

    def _start(self) -> None:
        self._container = open_container(self._file, self._clip.demuxer)
        self._stream = find_video_stream(self._container)
        self._codec = decoder_of(self._stream)
        self._codec.options = {"max_pixels": str(self._max_pixels)}
        self._codec.thread_type = ThreadType.AUTO
        self._codec.thread_count = self._num_threads
        try:
            self._codec.open(strict=False)
        except av.FFmpegError:
            # It gets no threads where the host has no more of them. Other reasons show again at the first packet.
            self._codec.thread_count = 1
        self._number = -1
        self._packets = self._read_packets()
        self._begin(self._packets, int(self._index.pts[0]))

    def _begin(self, packets: "Iterable[Packet[VideoStream] | None]", first: int) -> None:
        """Have the decoder, which holds nothing, go on with `packets`, of whose frames the one at `first` is the first.

        What is shown before that refers to frames that it does not have.
        """
        self._position = first - 1
        self._frames = (decoded for decoded in self._decode(packets) if decoded.pts >= first)

    def _seek(self, keyframe: int) -> None:
        """Make the frame at `keyframe`, or one before it, the next to be decoded."""
        if self._line is not None:
            self._skip(keyframe)
            return
        for seconds in _BACK_OFF_SECONDS:
            try:
                self._container.seek(keyframe - round(seconds / self._index.time_base), stream=self._stream)
            except av.FFmpegError:
                break
            packets = self._read_packets()
            landed = next((packet for packet in packets if packet and packet.is_keyframe), None)
            if landed and landed.pts is not None and landed.pts <= keyframe:
                self._begin(chain((landed,), packets), landed.pts)
                return
        self._container.close()
        self._start()

    def _skip(self, keyframe: int) -> None:
        """As `_seek`, where the file's own times lead nowhere: what comes before it is read, but not decoded."""
        assert self._line is not None
        number = int(np.flatnonzero((self._line.pts == keyframe) & self._line.are_shown)[0])
        if number > self._number:
            self._codec.flush_buffers()
            self._begin(dropwhile(lambda _: self._number < number, self._packets), keyframe)

    def _read_packets(self) -> "Iterator[Packet[VideoStream] | None]":
        """Each with its pts on the line. None is where the decoder is to hand out what it holds and begin anew."""
        try:
            for packet in demux(self._container, self._stream):
                if self._line is None or not packet.size:
                    yield packet
                    continue
                self._number += 1
                if self._number in self._line.fresh_starts:
                    yield None
                if self._line.are_read[self._number]:
                    packet.pts = int(self._line.pts[self._number])
                    yield packet
        except DEMUX_FAULTS:
            self.damaged.add(None)
            yield None

    def _decode(self, packets: "Iterable[Packet[VideoStream] | None]") -> Iterator[TimedFrame]:
        codec = self._codec
        is_exact = self._clip.demuxer in _ONE_PACKET_A_FRAME and not self._counts
        can_leave_out = is_exact and codec.name in _LEAVES_OUT_BY_PACKET
        times = iter(self._index.pts.tolist())
        for packet in packets:
            is_wanted = packet is None or not packet.size or packet.pts in self._wanted
            if self._reads_keyframes_only and not is_wanted:
                continue
            if can_leave_out:
                codec.skip_frame = "DEFAULT" if is_wanted else "NONREF"
            try:
                frames = codec.decode(packet)
                # Without the frames between them, one keyframe may hold the next one back.
                if self._reads_keyframes_only and packet and packet.size:
                    frames += codec.decode(None)
                    codec.flush_buffers()
                elif packet is None:
                    codec.flush_buffers()
            except av.FFmpegError:
                self.damaged.add(packet.pts if packet else None)
                if self._counts:
                    next(times, None)
                continue
            for frame in frames:
                pts = next(times, None) if self._counts else frame.pts
                if pts is None:
                    continue
                if frame.is_corrupt:
                    self.damaged.add(pts)
                yield TimedFrame(pts, frame)
