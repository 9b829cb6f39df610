"""One video file to the frames the model reads, at the size it reads them: examined, planned, then read."""

from typing import BinaryIO

import av

from keye.config.job import VideoPart
from keye.config.settings import VideoDecoder
from keye.worker.media.decoded import DecodedVideo, FitFrame, NewPixels, own_pixels
from keye.worker.media.frames import decord, pyav, torchcodec
from keye.worker.media.frames.clip import damaged, examine_clip
from keye.worker.media.frames.video_plan import OnFrame, plan_video
from keye.worker.media.limits import check_decoded_bytes

_CHOSEN = {"torchcodec": torchcodec.read_frames, "decord": decord.read_frames}


def _tell_nobody(done: int, total: int) -> None: ...


def decode_video(
    file: BinaryIO,
    name: str,
    part: VideoPart,
    fit_frame: FitFrame,
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
    plan = plan_video(clip.index, part, fit_frame, clip.upright_size, name)
    check_decoded_bytes(3 * len(plan.wanted) * plan.size[0] * plan.size[1], max_decoded_bytes, name)
    pixels = new_pixels((len(plan.wanted), *plan.size, 3))
    read = _CHOSEN[decoder](file, clip, plan, pixels, tell) if decoder in _CHOSEN else None
    if read is None:
        try:
            read = pyav.read_frames(file, clip, plan, pixels, tell, max_frame_pixels, num_threads)
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
