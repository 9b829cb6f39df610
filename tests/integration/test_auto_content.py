"""`content="auto"`: the frames that begin a scene, and those in which something moves."""

from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import pytest

from keye.config.job import Content, VideoPart
from keye.config.settings import Settings
from keye.worker.media.decoded import DecodedVideo
from keye.worker.media.frames.video import decode_video
from keye.worker.media.frames.video_plan import tell_thinning
from keye.worker.media.job_media import DecoderPool, MediaCache, MediaLimits, decode, fetch
from keye.worker.sizing import Sizing, VideoFit
from keye.worker.tasks.visual_inputs import visual_inputs
from tests.support.cut_clips import CODINGS, CutClip, make_cut_clip
from tests.support.zoo import Frame, draw_frame, encode_clip, read_number, steady_times

SIZE = (112, 196)
# One of each codec, and of those that do not place cuts.
NUMBERS = (1, 2, 4, 6, 7, 9, 10, 12, 13, 14)


def read(path: Path, **asked: object) -> DecodedVideo:
    with path.open("rb") as file:
        fit = VideoFit(0, SIZE, SIZE)
        return decode_video(
            file,
            VideoPart.model_validate({"uri": "file:", **asked}),
            lambda _part, num_frames, *_: fit._replace(num_frames=num_frames),
            10**8,
            num_threads=1,
        )


def num_near(cuts: tuple[float, ...], video: DecodedVideo) -> int:
    times = np.array(video.timestamps_seconds)
    return sum(bool(np.abs(times - cut).min() <= 0.2) for cut in cuts)


def num_within(stretches: tuple[tuple[float, float], ...], video: DecodedVideo) -> int:
    return sum(start <= time < end for time in video.timestamps_seconds for start, end in stretches)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[CutClip]:
    folder = tmp_path_factory.mktemp("cuts")
    return [make_cut_clip(folder, number, seconds=16, size=(180, 320)) for number in NUMBERS]


@pytest.mark.holds("docs/producers.md#how-much-of-a-video-is-read", "the first frame of each scene")
def test_each_cut_is_shown_and_what_stands_still_hardly(clips: list[CutClip]) -> None:
    autos = [read(clip.path, content="auto") for clip in clips]
    evens = [read(clip.path) for clip in clips]
    num_cuts = sum(len(clip.cuts) for clip in clips)
    assert sum(num_near(clip.cuts, auto) for clip, auto in zip(clips, autos, strict=True)) >= 0.95 * num_cuts
    still = [sum(num_within(c.still, v) for c, v in zip(clips, videos, strict=True)) for videos in (autos, evens)]
    assert still[0] <= 0.4 * still[1]
    for auto, even in zip(autos, evens, strict=True):
        assert len(auto.frames) == len(auto.plan.wanted) == len(auto.timestamps_seconds) <= len(even.frames)
        assert list(auto.timestamps_seconds) == sorted(set(auto.timestamps_seconds))


@pytest.mark.holds(
    "docs/producers.md#how-much-of-a-video-is-read", "the clearest first", "however small `max_frames` is"
)
def test_more_cuts_than_frames_fill_all_frames_with_cuts(clips: list[CutClip]) -> None:
    rich = [clip for clip in clips if len(clip.cuts) >= 3 and CODINGS[NUMBERS[clips.index(clip)]].codec != "mjpeg"]
    assert len(rich) >= 5
    for clip in rich:
        video = read(clip.path, content="auto", max_frames=3)
        assert len(video.frames) == 3
        times = video.timestamps_seconds
        assert all(min(abs(time - cut) for cut in clip.cuts) <= 0.2 for time in times), (clip.path.name, times)
        assert video.plan.cuts == read(clip.path, content="auto").plan.cuts


def test_pixels_are_those_of_their_times(tmp_path: Path) -> None:
    """Also where a cut took the place of an earlier frame."""
    path = encode_clip(tmp_path / "numbers.mp4", steady_times(300))
    for asked in ({}, {"max_frames": 5}):
        video = read(path, content="auto", **asked)
        assert [read_number(frame) for frame in video.frames] == [round(30 * t) for t in video.timestamps_seconds]


def test_only_the_stretch_asked_for_is_shown(clips: list[CutClip]) -> None:
    for clip in clips:
        video = read(clip.path, content="auto", start_seconds=4.0, end_seconds=9.0)
        assert all(3.9 < time < 9 for time in video.timestamps_seconds)


@pytest.mark.holds("docs/producers.md#how-much-of-a-video-is-read", "one in ten seconds of what stands still")
def test_a_clip_that_stands_still_is_shown_once_in_ten_seconds_and_nobody_is_warned(tmp_path: Path) -> None:
    path = tmp_path / "still.mp4"
    encode_still(path, seconds=32)
    video = read(path, content="auto")
    assert [round(time) for time in video.timestamps_seconds] == [0, 10, 20, 30]
    assert (video.plan.frames_still, video.plan.cuts) == (60, 0)
    assert video.plan.reasons == ("60 frames in which nothing has moved are left out",)
    assert tell_thinning(video.plan, 2.0) is None


def test_a_small_thing_that_moves_is_movement(tmp_path: Path) -> None:
    path = tmp_path / "cursor.mp4"
    encode_still(path, seconds=10, cursor=True)
    assert len(read(path, content="auto").frames) > 15


@pytest.mark.holds("docs/producers.md#how-much-of-a-video-is-read", "how many frames were left out (`frames_still`)")
def test_the_result_tells_the_cuts_and_what_was_left_out(
    clips: list[CutClip], decoders: DecoderPool, tmp_path: Path
) -> None:
    clip = clips[0]
    part = VideoPart(uri=str(clip.path), content=Content.AUTO)
    limits = MediaLimits.of(Settings(media_roots=(clip.path.parent,)))
    sizing = Sizing(factor=28, min_pixels=28 * 28, max_pixels=2**18)
    fetched = fetch([part], limits, MediaCache(tmp_path, max_bytes=0))
    decoded = decode([part], fetched, limits, sizing, decoders)
    _, _, (seen,) = visual_inputs(sizing, [part], [medium.identity for medium in fetched], decoded)
    assert seen.content == "auto"
    assert len(seen.frame_times_seconds) == seen.frames
    assert seen.cuts == len(clip.cuts) > 0
    assert seen.frames_still > 0
    assert seen.frames + seen.frames_still >= (seen.frames_asked or 0)
    assert any("nothing has moved" in reason for reason in seen.reasons)


def test_plain_colours_are_scenes_and_a_fade_of_them_is_none(tmp_path: Path) -> None:
    colours = [(200, 30, 30), (30, 30, 200), (120, 120, 120), (160, 160, 160)]
    plain = [np.full((96, 160, 3), colour, np.uint8) for colour in colours for _ in range(50)]
    fade = [np.full((96, 160, 3), 160 - 6 * step, np.uint8) for step in range(25)]
    path = tmp_path / "colours.mp4"
    encode(path, [*plain, *fade, *fade[-1:] * 50], rate=25)
    video = read(path, content="auto")
    assert video.plan.cuts == 3
    assert [time for time in video.timestamps_seconds if time < 8] == pytest.approx([0, 2, 4, 6], abs=0.1)


def encode_still(path: Path, seconds: int, cursor: bool = False) -> None:

    pictures = [draw_frame(5, (360, 640)).copy() for _ in range(seconds * 10)]
    if cursor:
        for number, picture in enumerate(pictures):
            picture[200:212, 10 + 6 * number : 18 + 6 * number] = 255 - picture[200:212, 10 : 10 + 8]
    encode(path, pictures, rate=10)


def encode(path: Path, pictures: Sequence[Frame], rate: int) -> None:
    height, width, _ = pictures[0].shape
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=rate, width=width, height=height, pix_fmt="yuv420p")
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode(None))
