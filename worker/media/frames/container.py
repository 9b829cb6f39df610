"""Video files opened by one reader that we name, and by no other: FFmpeg guesses nothing and follows no references."""

from typing import BinaryIO, NoReturn

import av
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

from keye.config.outcome import ErrorCode
from keye.worker.media.fault import MediaFault

_BUFFER_BYTES = 256 * 2**10

# What demuxing a damaged file may raise. IndexError: PyAV meets a stream that the damage makes appear midway.
DEMUX_FAULTS = (av.FFmpegError, IndexError)


def open_container(file: BinaryIO, demuxer: str, name: str) -> InputContainer:
    """Open `file` from its start with exactly this FFmpeg demuxer; raises `av.FFmpegError` where that fails."""

    def refuse(url: str, flags: int, options: dict[str, str]) -> NoReturn:
        raise MediaFault(ErrorCode.MEDIA_FORBIDDEN, f"{name}: refers to another file, and only one file is read.")

    file.seek(0)
    # The file's own titles and remarks may be in any encoding.
    return av.open(file, "r", format=demuxer, io_open=refuse, buffer_size=_BUFFER_BYTES, metadata_errors="replace")


def find_video_stream(container: InputContainer, name: str) -> VideoStream:
    """The first stream of moving pictures that can be decoded; the cover of a song is none."""
    moving = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not moving:
        raise MediaFault(ErrorCode.MEDIA_UNSUPPORTED, f"{name}: has no video stream. Send a file with moving pictures.")
    stream = next((s for s in moving if s.codec_context is not None), None)
    if stream is None:
        raise MediaFault(ErrorCode.MEDIA_UNSUPPORTED, f"{name}: its codec is not decoded here. Send H.264, VP9 or AV1.")
    return stream
