"""One video file to the frames the model reads, at the size it reads them. Which frames: see `sample_frames`."""

from collections.abc import Callable
from typing import BinaryIO

import av
import numpy as np
import numpy.typing as npt
from av.video.reformatter import Interpolation, VideoReformatter

from config.error_codes import ErrorCode
from config.job import VideoPart
from worker.media.container import find_video_stream, open_container
from worker.media.decoded import DecodedVideo, FitFrame
from worker.media.fault import MediaFault
from worker.media.frame_reader import FrameReader
from worker.media.packet_index import index_packets
from worker.media.sample_frames import sample_frames
from worker.media.signature import recognise_format
from worker.media.size_limit import check_decoded_bytes, check_pixels

# As the model's own tools resize; where it shrinks, swscale widens the kernel, so nothing aliases.
_BICUBIC = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP


def decode_video(
    file: BinaryIO,
    name: str,
    part: VideoPart,
    fit_frame: FitFrame,
    max_frame_pixels: int,
    max_decoded_bytes: int,
    on_frame: Callable[[int, int], None] | None = None,
) -> DecodedVideo:
    """Sample `file` as `part` asks. Frames are upright; a damaged one is replaced by its neighbour and counted.

    `on_frame` is told the number of frames done and that of all.
    """
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
            index = index_packets(container, stream)
        if index is None:
            raise MediaFault(ErrorCode.MEDIA_CORRUPT, f"{name}: holds no frame.")
        sample = sample_frames(index.shown_at, index.duration_seconds, part, name)
        wanted = [int(pts) for pts in index.pts[sample.indices]]
        with FrameReader(file, file_format.demuxer, name, index, wanted, max_frame_pixels) as reader:
            first = reader.read(wanted[0]).frame
            num_turns = round(first.rotation / 90) % 4
            original_size = _turn((first.height, first.width), num_turns)
            size = fit_frame(part, len(wanted), *original_size)
            check_decoded_bytes(3 * len(wanted) * size[0] * size[1], max_decoded_bytes, name)
            frames, times = _read_resized(reader, wanted, size, num_turns, on_frame)
    except av.FFmpegError as error:
        raise MediaFault(
            ErrorCode.MEDIA_CORRUPT, f"{name}: the {file_format.name} video is damaged ({error.strerror})."
        ) from None
    start, tick = int(index.pts[0]), float(index.time_base)
    return DecodedVideo(
        frames=frames,
        timestamps_seconds=tuple((time - start) * tick for time in times),
        fps=sample.fps,
        original_size=original_size,
        duration_seconds=index.duration_seconds,
        frames_corrupt=len(reader.damaged),
    )


def _read_resized(
    reader: FrameReader,
    wanted: list[int],
    size: tuple[int, int],
    num_turns: int,
    on_frame: Callable[[int, int], None] | None,
) -> tuple[npt.NDArray[np.uint8], list[int]]:
    """Frames [T, H, W, 3] of `size` (H, W), and the pts each of them really has."""
    frames = np.empty((len(wanted), *size, 3), np.uint8)
    times = []
    height, width = _turn(size, num_turns)
    reformatter = VideoReformatter()
    for position, pts in enumerate(wanted):
        shown = reader.read(pts)
        # One thread: the cores belong to the jobs beside this one.
        resized = reformatter.reformat(shown.frame, width, height, "rgb24", interpolation=_BICUBIC, threads=1)
        frames[position] = np.rot90(resized.to_ndarray(), num_turns)
        times.append(shown.pts)
        if on_frame is not None:
            on_frame(position + 1, len(wanted))
    return frames, times


def _turn(size: tuple[int, int], num_turns: int) -> tuple[int, int]:
    return size if num_turns % 2 == 0 else (size[1], size[0])
