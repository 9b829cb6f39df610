"""One video file to the frames the model reads, at the size it reads them: examined, planned, then read."""

import importlib
import os
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import BinaryIO

import av
import numpy as np
import numpy.typing as npt

from keye.config.job import Content, VideoPart
from keye.config.settings import VideoDecoder
from keye.worker.media.decoded import DecodedVideo, NewPixels, VideoPlan, own_pixels
from keye.worker.media.frames.auto_selection import AutoSelection
from keye.worker.media.frames.clip import Clip, damaged, examine_clip
from keye.worker.media.frames.frame_reader import FrameReader
from keye.worker.media.frames.picture import Screen
from keye.worker.media.frames.sample_clip import encode_sample_clip
from keye.worker.media.frames.video_plan import FitVideo, places_to_look, plan_video, tell_joins
from keye.worker.sizing import VideoFit

# Called with the frames done and the frames in all.
OnFrame = Callable[[int, int], None]

# The pts that frames really have, in ticks, and the frames: uint8 [T, H, W, 3], upright, of the plan's size.
_Batch = tuple[Sequence[int], npt.NDArray[np.generic]]

# decord gives wrong frames of MPEG-TS and HEVC while their times look right, and cannot open AV1.
_DECORD_WRONG_CONTAINERS = ("mpegts", "mpeg")
_DECORD_WRONG_CODECS = ("hevc", "av1", "libdav1d")

# Which it holds about three times.
_DECORD_MAX_BYTES = 2**29

# Frames that decord and torchcodec decode in one call; between two calls there is news of how far it got.
_BATCH = 16


def decode_video(
    file: BinaryIO,
    part: VideoPart,
    fit_video: FitVideo,
    max_frame_pixels: int,
    on_frame: OnFrame = lambda *_: None,
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

    clip = examine_clip(file, max_frame_pixels)
    plan = plan_video(clip.index, part, fit_video, clip.upright_size)
    pixels = new_pixels((len(plan.wanted), *plan.size, 3))
    is_auto = part.content is Content.AUTO
    is_for_other = decoder in _OTHERS and clip.is_plain and not is_auto
    pts_read = _fill(pixels, _OTHERS[decoder](file, clip, plan), tell) if is_for_other else ()
    num_damaged = 0
    if len(pts_read) < len(pixels):
        decoder = "pyav"
        screen = Screen(clip.look, plan.size)
        selection = AutoSelection(pixels, screen, clip.index.time_base, plan.wanted[0]) if is_auto else None
        places = places_to_look(clip.index, part, plan.wanted) if selection else plan.wanted
        watch = selection.watch if selection else None
        try:
            with closing(FrameReader(file, clip, places, max_frame_pixels, num_threads, watch)) as reader:
                if selection:
                    plan = selection.fill(reader, places, plan, tell)
                    pts_read = plan.wanted
                else:
                    pts_read = _fill(pixels, _read_by_pyav(reader, screen, plan), tell)
                num_damaged = len(reader.damaged)
        except av.FFmpegError as error:
            raise damaged(clip.format_name, error) from None
    start = int(clip.index.pts[0])
    return DecodedVideo(
        frames=pixels[: len(pts_read)],
        ticks=tuple(pts - start for pts in pts_read),
        tick_seconds=clip.index.time_base.as_integer_ratio(),
        plan=plan,
        original_size=clip.upright_size,
        duration_seconds=clip.index.duration_seconds,
        frames_corrupt=num_damaged,
        decoder=decoder,
        format=clip.format_name,
        codec=clip.codec,
        warnings=tell_joins(clip.index),
    )


def _fill(pixels: npt.NDArray[np.uint8], batches: Iterator[_Batch], on_frame: OnFrame) -> tuple[int, ...]:
    """The pts of the frames that `batches` came to: fewer than `pixels` where they ended early."""
    pts_read: list[int] = []
    for pts, frames in batches:
        pixels[len(pts_read) : len(pts_read) + len(pts)] = frames
        pts_read += pts
        on_frame(len(pts_read), len(pixels))
    return tuple(pts_read)


def _read_by_pyav(reader: FrameReader, screen: Screen, plan: VideoPlan) -> Iterator[_Batch]:
    """Right on every kind of clip; a damaged frame is replaced by its neighbour."""
    for pts in plan.wanted:
        shown = reader.read(pts)
        yield [shown.pts], screen.show(shown.frame)[np.newaxis]


def _read_by_decord(file: BinaryIO, clip: Clip, plan: VideoPlan) -> Iterator[_Batch]:
    """Ends early on clips that decord fails on or is known to read wrongly: it knows no edit lists, no open groups.

    It reads by a path, which a decoder child may not open, or all of a file into memory, so it gets no large ones.
    """
    is_known_wrong = clip.demuxer in _DECORD_WRONG_CONTAINERS or clip.codec in _DECORD_WRONG_CODECS
    is_large = file.seek(0, os.SEEK_END) > _DECORD_MAX_BYTES
    is_otherwise = clip.index.hides_frames or clip.index.has_open_groups or clip.index.line is not None
    if is_known_wrong or is_large or is_otherwise:
        return
    from decord import DECORDError, VideoReader

    height, width = plan.size
    file.seek(0)
    try:
        reader = VideoReader(file, width=width, height=height, num_threads=1)
        if len(reader) != len(clip.index.pts):
            return
        for start in range(0, len(plan.wanted), _BATCH):
            wanted = plan.wanted[start : start + _BATCH]
            yield wanted, reader.get_batch(np.searchsorted(clip.index.pts, wanted).tolist()).asnumpy()
    except DECORDError:
        return


def _read_by_torchcodec(file: BinaryIO, clip: Clip, plan: VideoPlan) -> Iterator[_Batch]:
    """Exact mode. Ends early where torchcodec fails, finds no FFmpeg, or gives frames of another size or others than
    those wanted, as it does for MPEG-TS. It knows no line of time but the file's.
    """
    if clip.index.line is not None:
        return
    from torchcodec.decoders import VideoDecoder
    from torchcodec.transforms import Resize

    tick = float(clip.index.time_base)
    file.seek(0)
    try:
        decoder = VideoDecoder(file, dimension_order="NHWC", transforms=[Resize(plan.size)])
        for start in range(0, len(plan.wanted), _BATCH):
            wanted = plan.wanted[start : start + _BATCH]
            batch = decoder.get_frames_at(np.searchsorted(clip.index.pts, wanted).tolist())
            are_wanted = np.array_equal(np.round(batch.pts_seconds.numpy() / tick), wanted)
            if not are_wanted or batch.data.shape != (len(wanted), *plan.size, 3):
                return
            yield wanted, batch.data.numpy()
    except (RuntimeError, ValueError, IndexError):
        return


def load_decoder(decoder: VideoDecoder) -> None:
    """Have it and PyAV import now what they would when they meet a kind of stream for the first time."""
    for module in pkgutil.walk_packages(av.__path__, "av."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    if decoder in _OTHERS:
        fit = VideoFit(num_frames=2, size=(30, 46), ample_size=(30, 46))  # resized, as most are
        decode_video(encode_sample_clip(), VideoPart(uri="file:"), lambda *_: fit, 64 * 64, decoder=decoder)


_OTHERS = {"torchcodec": _read_by_torchcodec, "decord": _read_by_decord}
