"""Which frames are read: as many as the policy asks for, spread evenly over the stretch asked for."""

import numpy as np
import pytest

from config.error_codes import ErrorCode
from config.job import Content, VideoPart
from worker.media.fault import MediaFault
from worker.media.sample_frames import FrameSample, sample_frames


def sample(num_frames: int, rate: float, **asked: object) -> FrameSample:
    part = VideoPart.model_validate({"uri": "/clip.mp4", **asked})
    return sample_frames(np.arange(num_frames) / rate, num_frames / rate, part, "the clip")


def test_two_frames_a_second_are_read_unless_asked_otherwise() -> None:
    indices, fps = sample(300, 30)
    assert len(indices) == 20
    assert fps == 2.0


def test_first_and_last_frame_are_among_them_and_steps_are_even() -> None:
    indices, _ = sample(300, 30)
    assert (indices[0], indices[-1]) == (0, 299)
    assert set(np.diff(indices)) <= {15, 16}


@pytest.mark.parametrize(("content", "fps"), [("action", 15), ("static", 1), ("dialogue", 5), ("hd", 10)])
def test_content_decides_the_rate(content: Content, fps: int) -> None:
    assert len(sample(300, 30, content=content).indices) == 10 * fps


def test_no_more_frames_are_read_than_the_clip_has() -> None:
    indices, fps = sample(50, 10, content="action")
    assert indices == list(range(50))
    assert fps == 10


def test_short_clip_still_gives_four_frames_by_default_but_one_where_fps_asks_for_it() -> None:
    assert len(sample(15, 30).indices) == 4
    assert sample(15, 30, fps=2) == FrameSample([0], 2.0)


def test_long_clip_is_thinned_to_768_frames_or_to_max_frames_and_reports_the_rate_that_remains() -> None:
    assert len(sample(36_000, 30).indices) == 768
    indices, fps = sample(36_000, 30, max_frames=10)
    assert (len(indices), indices[-1], fps) == (10, 35_999, 10 / 1200)


def test_only_the_stretch_asked_for_is_read() -> None:
    indices, fps = sample(300, 30, fps=5, start_seconds=2, end_seconds=4)
    assert (indices[0], indices[-1], len(indices), fps) == (60, 119, 10, 5.0)


def test_end_after_the_clip_means_the_clips_end() -> None:
    assert sample(300, 30, end_seconds=99) == sample(300, 30)


def test_start_between_two_frames_takes_the_one_on_screen() -> None:
    assert sample(10, 1, fps=1, start_seconds=2.5, end_seconds=5).indices[0] == 2


def test_start_after_the_clip_is_the_callers_fault_and_says_when_it_ends() -> None:
    with pytest.raises(MediaFault, match=r"start_seconds is 12, but the clip ends at 10\.000 s") as caught:
        sample(300, 30, start_seconds=12)
    assert caught.value.code is ErrorCode.INVALID_JOB


def test_uneven_clip_is_read_at_even_times_not_at_even_indices() -> None:
    shown_at = np.array([0, 0.1, 0.2, 0.3, 8.0, 9.0])
    indices, _ = sample_frames(shown_at, 10.0, VideoPart(uri="/clip.mp4", fps=0.6), "the clip")
    assert indices == [0, 3, 3, 3, 3, 5]


def test_single_frame_is_enough() -> None:
    assert sample(1, 25).indices == [0]
