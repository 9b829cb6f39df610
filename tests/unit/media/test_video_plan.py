"""What is read of a video: what was asked, as far as the clip, the limits and the model's context allow, and why."""

from fractions import Fraction

import numpy as np
import pytest

from keye.config.job import VideoPart
from keye.worker.media.decoded import VideoPlan
from keye.worker.media.frames.clip import PacketIndex
from keye.worker.media.frames.video_plan import FitVideo, plan_video, tell_thinning
from keye.worker.sizing import VideoFit

HD = (1080, 1920)


def take_all(_part: VideoPart, num_frames: int, height: int, width: int) -> VideoFit:
    return VideoFit(num_frames, (height, width), (height, width))


def plan(
    seconds: float, fit_video: FitVideo = take_all, keyframe_every: int = 60, rate: int = 30, **asked: object
) -> VideoPlan:
    """Of a clip of 30 frames a second."""
    pts = np.arange(round(seconds * rate), dtype=np.int64)
    index = PacketIndex(
        pts=pts,
        sizes=np.ones(len(pts), np.int64),
        keyframe_pts=pts[::keyframe_every],
        end=len(pts),
        time_base=Fraction(1, rate),
        hides_frames=False,
        has_open_groups=False,
    )
    return plan_video(index, VideoPart.model_validate({"uri": "/clip", **asked}), fit_video, HD)


def test_what_is_asked_for_is_what_is_read_and_nothing_needs_a_reason() -> None:
    planned = plan(10, fps=3)
    assert (len(planned.wanted), planned.fps, planned.size) == (30, 3.0, HD)
    assert (planned.frames_asked, planned.fps_asked, planned.size_asked, planned.reasons) == (30, 3.0, HD, ())


@pytest.mark.parametrize("asked", [{"end_seconds": 5e-324}, {"start_seconds": 5e-324, "end_seconds": 1e-323}])
def test_a_stretch_that_is_over_before_its_first_frame_is_that_frame(asked: dict[str, float]) -> None:
    planned = plan(10, **asked)
    assert set(planned.wanted) == {0}
    assert 0 < planned.fps < float("inf")


@pytest.mark.holds("docs/producers.md#how-much-of-a-video-is-read", "of a long one 768 at most")
def test_long_clip_is_thinned_to_768_frames_and_the_plan_says_so() -> None:
    planned = plan(1200)
    assert (len(planned.wanted), planned.frames_asked, planned.fps) == (768, 2400, 768 / 1200)
    assert planned.reasons == ("the model takes at most 768, and 2400 frames were asked for",)


def test_max_frames_thins_and_keeps_the_first_and_the_last_frame() -> None:
    planned = plan(1200, max_frames=10)
    assert (len(planned.wanted), planned.wanted[0], planned.wanted[-1]) == (10, 0, 35_999)
    assert planned.fps == 10 / 1200
    assert planned.reasons == ("max_frames is 10, and 2400 frames were asked for",)


@pytest.mark.holds("docs/producers.md#how-much-of-a-video-is-read", "the most frames, up to 4,096, in place of 768")
def test_max_frames_stands_in_place_of_768_above_it_too() -> None:
    assert len(plan(1200, max_frames=2000).wanted) == 2000
    assert len(plan(1200, fps=30, max_frames=4096).wanted) == 4096


@pytest.mark.holds("docs/producers.md#how-much-of-a-video-is-read", "By default 2 frames a second")
def test_a_short_clip_is_read_at_four_frames_where_it_has_them_and_none_says_otherwise() -> None:
    assert [len(plan(seconds).wanted) for seconds in (2.5, 1, 0.2, 0.1)] == [5, 4, 4, 3]
    assert [len(plan(1, **asked).wanted) for asked in ({"fps": 2}, {"max_frames": 1})] == [2, 1]


def test_no_more_frames_are_read_than_the_clip_has() -> None:
    planned = plan(2, fps=60)
    assert planned.wanted == tuple(range(60))
    assert planned.reasons == ("the clip has 60 frames where 120 were asked for",)


@pytest.mark.holds("docs/producers.md#how-much-of-a-video-is-read", "`result.media` tells for each what was asked")
def test_model_that_takes_fewer_and_smaller_frames_gets_them_spread_over_the_whole_clip() -> None:
    planned = plan(100, lambda _part, _num, _height, _width: VideoFit(50, (252, 448), (504, 896)))
    assert (len(planned.wanted), planned.wanted[-1], planned.fps) == (50, 2999, 0.5)
    assert (planned.size, planned.size_asked) == ((252, 448), (504, 896))
    assert planned.reasons == (
        "frames are 448 x 252 instead of 896 x 504 to fit the context",
        "the context has room for 50 of 200 frames",
    )


@pytest.mark.holds("docs/producers.md#how-much-of-a-video-is-read", "only the keyframe before each time")
def test_keyframes_are_taken_only_when_asked_for() -> None:
    planned = plan(100, sampling="keyframes", fps=0.25)
    assert len(planned.wanted) == 25
    assert all(pts % 60 == 0 for pts in planned.wanted)
    assert not all(pts % 60 == 0 for pts in plan(100, fps=0.25).wanted)


def test_keyframes_of_a_clip_are_all_there_are() -> None:
    planned = plan(100, keyframe_every=300, sampling="keyframes")
    assert planned.wanted == tuple(range(0, 3000, 300))
    assert planned.reasons == ("the clip has 10 keyframes where 200 were asked for",)


@pytest.mark.holds("docs/producers.md#how-much-of-a-video-is-read", "for whichever of these reasons")
def test_clip_read_more_thinly_than_the_floor_is_told_of_with_its_coverage() -> None:
    told = tell_thinning(plan(6000), 0.5)
    assert told is not None
    assert "0.128 frames a second are read, one every 7.81 s; 2 were asked for" in told
    assert "26% of the video is covered (the model takes at most 768, and 12000 frames were asked for)" in told
    assert "start_seconds" in told
    by_its_caller = tell_thinning(plan(60, max_frames=2), 0.5)
    assert by_its_caller is not None
    assert "(max_frames is 2, and 120 frames were asked for)" in by_its_caller
    assert tell_thinning(plan(6000), 0.1) is None
    assert tell_thinning(plan(6000, fps=0.1), 0.5) is None


def test_nothing_is_thinned_where_all_there_is_is_read() -> None:
    """Of a slide show every frame, and every keyframe where only those were asked for."""
    assert tell_thinning(plan(60, rate=1), 1.5) is None
    assert tell_thinning(plan(100, keyframe_every=300, sampling="keyframes"), 0.5) is None
    assert tell_thinning(plan(6000, keyframe_every=30, sampling="keyframes"), 0.5) is not None
