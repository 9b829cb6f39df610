"""What is learnt of a video file before it is planned: its packets, and from one frame its upright size."""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import BinaryIO

import av
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from keye.config.outcome import ErrorCode
from keye.worker.media.decoded import Size
from keye.worker.media.fault import MediaFault
from keye.worker.media.frames.container import find_video_stream, open_container
from keye.worker.media.frames.packet_index import PacketIndex, index_packets
from keye.worker.media.limits import check_pixels
from keye.worker.media.signature import recognise_format


@dataclass(frozen=True, slots=True)
class Clip:
    """`stored_size` is (height, width) as encoded; `num_turns` quarters counterclockwise make it upright."""

    name: str
    format_name: str
    demuxer: str
    codec: str
    index: PacketIndex
    stored_size: Size
    num_turns: int

    @property
    def upright_size(self) -> Size:
        return self.turn(self.stored_size)

    def turn(self, size: Size) -> Size:
        return size if self.num_turns % 2 == 0 else (size[1], size[0])


def examine_clip(file: BinaryIO, name: str, max_frame_pixels: int) -> Clip:
    """Raises `MediaFault` for what is no video, holds no frame, or has frames beyond the limit."""
    file_format = recognise_format(file)
    if file_format.demuxer is None:
        raise MediaFault(
            ErrorCode.MEDIA_UNSUPPORTED,
            f"{name}: is no video that is decoded here; it looks like {file_format.name}. Send MP4 or WebM.",
        )
    try:
        with open_container(file, file_format.demuxer, name) as container:
            stream = find_video_stream(container, name)
            check_pixels(stream.width, stream.height, name, max_frame_pixels)
            first = _FirstFrame(stream, max_frame_pixels)
            time_base = stream.time_base or Fraction(1, av.time_base)
            index = index_packets(first.watch(container.demux(stream)), time_base)
            codec, size = stream.codec_context.name, (stream.height, stream.width)
    except av.FFmpegError as error:
        raise damaged(name, file_format.name, error) from None
    if index is None:
        raise MediaFault(ErrorCode.MEDIA_CORRUPT, f"{name}: holds no frame.")
    num_turns = 0
    if first.frame is None and 0 in size:
        raise MediaFault(ErrorCode.MEDIA_CORRUPT, f"{name}: none of its frames can be decoded.")
    if first.frame is not None:
        size, num_turns = (first.frame.height, first.frame.width), round(first.frame.rotation / 90) % 4
    if 0 in size:
        raise MediaFault(
            ErrorCode.MEDIA_CORRUPT, f"{name}: tells no size that can be, and none of its frames is whole."
        )
    return Clip(name, file_format.name, file_format.demuxer, codec, index, size, num_turns)


def damaged(name: str, format_name: str, error: av.FFmpegError) -> MediaFault:
    if isinstance(error, MemoryError):
        return MediaFault(
            ErrorCode.MEDIA_TOO_LARGE,
            f"{name}: takes more memory to decode than a decoder may have. Send a smaller one.",
        )
    return MediaFault(ErrorCode.MEDIA_CORRUPT, f"{name}: the {format_name} video is damaged ({error.strerror}).")


class _FirstFrame:
    """Decodes the first keyframe that can be: only a frame tells how it is cropped and turned."""

    def __init__(self, stream: VideoStream, max_pixels: int) -> None:
        self.frame: VideoFrame | None = None
        self._codec = stream.codec_context
        self._codec.options = {"max_pixels": str(max_pixels)}
        self._codec.thread_count = 1

    def watch(self, packets: "Iterator[Packet[VideoStream]]") -> "Iterator[Packet[VideoStream]]":
        for packet in packets:
            if self.frame is None and packet.is_keyframe and packet.size:
                self.frame = self._decode(packet)
            yield packet

    def _decode(self, packet: "Packet[VideoStream]") -> VideoFrame | None:
        try:
            frames = [*self._codec.decode(packet), *self._codec.decode(None)]
        except av.FFmpegError:
            return None
        finally:
            self._codec.flush_buffers()
        return next(iter(frames), None)
