"""`content="auto"` against even sampling, on clips of known cuts and still stretches: what is seen, and its cost."""

import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

from keye.config.job import VideoPart
from keye.worker.media.decoded import DecodedVideo
from keye.worker.media.frames.video import decode_video
from keye.worker.sizing import VideoFit
from tests.support.cut_clips import CODINGS, CutClip, make_cut_clip

SIZE = (252, 448)
NEAR_SECONDS = 0.2
ROUNDS = 3
BUDGETS = (None, 8)


def run() -> str:
    with tempfile.TemporaryDirectory() as folder:
        clips = [make_cut_clip(Path(folder), number) for number in range(len(CODINGS))]
        rows = [_measure(clips, most) for most in BUDGETS]
    return "\n".join(
        [
            f"{len(clips)} clips of 640x360, 40 s each, with {sum(len(clip.cuts) for clip in clips)} cuts and "
            f"{sum(end - start for clip in clips for start, end in clip.still):.0f} s in which nothing moves; one "
            f"thread, CPU time of all clips, medians of {ROUNDS} rounds.",
            "",
            "| max_frames | of the cuts that there are frames for, seen within 0.2 s | evenly "
            "| frames of what stands still | evenly | CPU of even sampling | CPU of even sampling at 2 a second |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def _measure(clips: list[CutClip], most: int | None) -> str:
    asked = {"uri": "file:", "max_frames": most}
    auto, even = VideoPart(**asked, content="auto"), VideoPart(**asked)
    rounds = [[_read_all(clips, part) for part in (auto, even, VideoPart(uri="file:"))] for _ in range(ROUNDS)]
    seconds = [median(each[way][1] for each in rounds) for way in range(3)]
    videos = [rounds[0][way][0] for way in range(2)]
    needed = sum(min(len(clip.cuts), most or len(clip.cuts)) for clip in clips)
    seen = [sum(map(_cuts_seen, clips, ways)) / needed for ways in videos]
    still = [sum(map(_still_frames, clips, ways)) for ways in videos]
    shares = f"{seen[0]:.1%} | {seen[1]:.1%} | {still[0]} | {still[1]}"
    return f"| {most or 'none'} | {shares} | {seconds[0] / seconds[1]:.2f} | {seconds[0] / seconds[2]:.2f} |"


def _read_all(clips: list[CutClip], part: VideoPart) -> tuple[list[DecodedVideo], float]:
    began_at = time.process_time()
    videos = []
    for clip in clips:
        with clip.path.open("rb") as file:
            videos.append(decode_video(file, part, _fit, 10**8, num_threads=1))
    return videos, time.process_time() - began_at


def _fit(_part: VideoPart, num_frames: int, _height: int, _width: int) -> VideoFit:
    return VideoFit(num_frames, SIZE, SIZE)


def _cuts_seen(clip: CutClip, video: DecodedVideo) -> int:
    times = np.array(video.timestamps_seconds)
    seen = sum(bool(np.abs(times - cut).min() <= NEAR_SECONDS) for cut in clip.cuts)
    return min(seen, len(times))


def _still_frames(clip: CutClip, video: DecodedVideo) -> int:
    return sum(start <= time < end for time in video.timestamps_seconds for start, end in clip.still)
