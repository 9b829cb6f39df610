"""One video file to the frames the model reads, at the size it reads them: examined, planned, then read."""

import os
import tempfile
from collections.abc import Callable, Sequence
from typing import BinaryIO, NamedTuple

import av
import numpy as np
import numpy.typing as npt
from av.video.reformatter import Interpolation, VideoReformatter

from keye.config.job import VideoPart
from keye.config.settings import VideoDecoder
from keye.worker.media.decoded import DecodedVideo, NewPixels, VideoPlan, own_pixels
from keye.worker.media.frames.clip import Clip, damaged, examine_clip
from keye.worker.media.frames.frame_reader import FrameReader
from keye.worker.media.frames.video_plan import FitVideo, plan_video
from keye.worker.media.limits import check_decoded_bytes

# Called with the frames done and the frames in all.
OnFrame = Callable[[int, int], None]

# uint8 [T, H, W, 3] of the plan's size, to be filled with upright frames.
_Pixels = npt.NDArray[np.uint8]


class _FramesRead(NamedTuple):
    """`pts` are those that the frames really have, in ticks."""

    decoder: str
    pts: Sequence[int]
    num_damaged: int


# As the model's own tools resize; where it shrinks, swscale widens the kernel, so nothing aliases.
_BICUBIC = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP

# decord gives wrong frames of MPEG-TS and HEVC while their times look right, and cannot open AV1.
_DECORD_WRONG_CONTAINERS = ("mpegts", "mpeg")
_DECORD_WRONG_CODECS = ("hevc", "av1", "libdav1d")

# Frames that decord and torchcodec decode in one call; between two calls there is news of how far it got.
_BATCH = 16


def _tell_nobody(done: int, total: int) -> None: ...


def decode_video(
    file: BinaryIO,
    name: str,
    part: VideoPart,
    fit_video: FitVideo,
    max_frame_pixels: int,
    max_decoded_bytes: int,
    on_frame: OnFrame = _tell_nobody,
    new_pixels: NewPixels = own_pixels,
    decoder: VideoDecoder = "pyav",
    num_threads: int = 0,
) -> DecodedVideo:
    """Sample `file` as `part` asks. Frames are upright; a damaged one is replaced by its neighbour and counted.

    `on_frame` is told the number of frames done and that of all. PyAV steps in for a `decoder` that cannot read the
    clip, or would read it wrongly; until it has caught up, the number stays what it was. `num_threads` are
    PyAV's; 0 is one a core.
    """
    most_done = 0

    def tell(done: int, total: int) -> None:
        nonlocal most_done
        most_done = max(most_done, done)
        on_frame(most_done, total)

    clip = examine_clip(file, name, max_frame_pixels)
    plan = plan_video(clip.index, part, fit_video, clip.upright_size, name)
    check_decoded_bytes(3 * len(plan.wanted) * plan.size[0] * plan.size[1], max_decoded_bytes, name)
    pixels = new_pixels((len(plan.wanted), *plan.size, 3))
    read = _CHOSEN[decoder](file, clip, plan, pixels, tell) if decoder in _CHOSEN else None
    if read is None:
        try:
            read = _read_by_pyav(file, clip, plan, pixels, tell, max_frame_pixels, num_threads)
        except av.FFmpegError as error:
            raise damaged(name, clip.format_name, error) from None
    start, tick = int(clip.index.pts[0]), float(clip.index.time_base)
    return DecodedVideo(
        frames=pixels,
        timestamps_seconds=tuple((pts - start) * tick for pts in read.pts),
        plan=plan,
        original_size=clip.upright_size,
        duration_seconds=clip.index.duration_seconds,
        frames_corrupt=read.num_damaged,
        decoder=read.decoder,
    )


def _read_by_pyav(
    file: BinaryIO,
    clip: Clip,
    plan: VideoPlan,
    pixels: _Pixels,
    on_frame: OnFrame,
    max_frame_pixels: int,
    num_threads: int,
) -> _FramesRead:
    """Right on every kind of clip; a damaged frame is replaced by its neighbour.

    Raises `av.FFmpegError` where the file cannot be opened.
    """
    height, width = clip.turn(plan.size)
    times = []
    reformatter = VideoReformatter()
    with FrameReader(file, clip, plan.wanted, max_frame_pixels, num_threads) as reader:
        for position, pts in enumerate(plan.wanted):
            shown = reader.read(pts)
            # One thread: the cores belong to the jobs beside this one.
            resized = reformatter.reformat(shown.frame, width, height, "rgb24", interpolation=_BICUBIC, threads=1)
            pixels[position] = np.rot90(resized.to_ndarray(), clip.num_turns)
            times.append(shown.pts)
            on_frame(position + 1, len(plan.wanted))
        return _FramesRead("pyav", times, len(reader.damaged))


def _read_by_decord(
    file: BinaryIO, clip: Clip, plan: VideoPlan, pixels: _Pixels, on_frame: OnFrame
) -> _FramesRead | None:
    """None for clips that decord fails on or is known to read wrongly: edit lists and open groups are not for it."""
    is_known_wrong = clip.demuxer in _DECORD_WRONG_CONTAINERS or clip.codec in _DECORD_WRONG_CODECS
    if is_known_wrong or clip.index.hides_frames or clip.index.has_open_groups:
        return None
    from decord import DECORDError, VideoReader

    height, width = plan.size
    try:
        # By its handle: given a file object, decord reads all of it into memory first.
        reader = VideoReader(f"/proc/self/fd/{file.fileno()}", width=width, height=height, num_threads=1)
        if len(reader) != len(clip.index.pts):
            return None
        numbers = np.searchsorted(clip.index.pts, plan.wanted).tolist()
        for start in range(0, len(numbers), _BATCH):
            batch = reader.get_batch(numbers[start : start + _BATCH]).asnumpy()
            pixels[start : start + len(batch)] = batch
            on_frame(start + len(batch), len(numbers))
    except DECORDError:
        return None
    return _FramesRead("decord", plan.wanted, num_damaged=0)


def _read_by_torchcodec(
    file: BinaryIO, clip: Clip, plan: VideoPlan, pixels: _Pixels, on_frame: OnFrame
) -> _FramesRead | None:
    """Exact mode. None where torchcodec fails, finds no FFmpeg, or gives other frames than those
    wanted, as it does for MPEG-TS.
    """
    # Importing torch asks for a folder for temporary files, and Python looks for one by writing, which no child may.
    tempfile.tempdir = tempfile.tempdir or os.sep
    from torchcodec.decoders import VideoDecoder
    from torchcodec.transforms import Resize

    tick = float(clip.index.time_base)
    file.seek(0)
    try:
        decoder = VideoDecoder(file, dimension_order="NHWC", transforms=[Resize(plan.size)])
        for start in range(0, len(plan.wanted), _BATCH):
            wanted = np.array(plan.wanted[start : start + _BATCH])
            batch = decoder.get_frames_at(np.searchsorted(clip.index.pts, wanted).tolist())
            if not np.array_equal(np.round(batch.pts_seconds.numpy() / tick), wanted):
                return None
            pixels[start : start + len(wanted)] = batch.data.numpy()
            on_frame(start + len(wanted), len(plan.wanted))
    except (RuntimeError, ValueError, IndexError):
        return None
    return _FramesRead("torchcodec", plan.wanted, num_damaged=0)


_CHOSEN = {"torchcodec": _read_by_torchcodec, "decord": _read_by_decord}
