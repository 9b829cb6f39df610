"""Which frames are read: as many as the policy asks for, spread evenly over the stretch asked for."""

import numpy as np
import pytest

from keye.config.codes import ErrorCode
from keye.config.faults import Fault
from keye.config.job import Content, VideoPart
from keye.worker.media.frames.video_plan import Stretch, find_stretch, num_asked, rate_asked, spread_frames


def part(**asked: object) -> VideoPart:
    return VideoPart.model_validate({"uri": "/clip.mp4", **asked})


def stretch(num_frames: int, rate: float, **asked: object) -> Stretch:
    return find_stretch(np.arange(num_frames) / rate, num_frames / rate, part(**asked))


def test_two_frames_a_second_are_asked_for_unless_the_job_says_otherwise() -> None:
    assert (rate_asked(part(), 10), num_asked(part(), 10)) == (2.0, 20)
    assert num_asked(part(fps=3), 10) == 30


@pytest.mark.parametrize(
    ("content", "lowest", "highest"), [("action", 15, 30), ("static", 1, 5), ("dialogue", 5, 10), ("hd", 10, 15)]
)
def test_content_decides_the_rate_and_short_clips_are_read_faster(content: Content, lowest: int, highest: int) -> None:
    assert rate_asked(part(content=content), 600) == lowest
    assert rate_asked(part(content=content), 1) == highest
    between = 32 / (0.5 * (lowest + highest))
    assert lowest < rate_asked(part(content=content), between) < highest
    assert num_asked(part(content=content), between) == 32


def test_short_clip_still_gives_four_frames_by_default_but_one_where_fps_asks_for_it() -> None:
    assert num_asked(part(), 0.5) == 4
    assert num_asked(part(fps=2), 0.5) == 1


def test_first_and_last_frame_are_among_them_and_steps_are_even() -> None:
    indices = spread_frames(np.arange(300) / 30, stretch(300, 30), 20)
    assert (indices[0], indices[-1]) == (0, 299)
    assert set(np.diff(indices)) <= {15, 16}


def test_only_the_stretch_asked_for_is_read() -> None:
    asked = stretch(300, 30, start_seconds=2, end_seconds=4)
    assert asked == Stretch(first=60, last=119, start=2, end=4)
    assert (asked.seconds, asked.num_frames) == (2, 60)


def test_end_after_the_clip_means_the_clips_end() -> None:
    assert stretch(300, 30, end_seconds=99) == stretch(300, 30)


def test_start_between_two_frames_takes_the_one_on_screen() -> None:
    assert stretch(10, 1, start_seconds=2.5, end_seconds=5).first == 2


def test_start_after_the_clip_is_the_callers_fault_and_says_when_it_ends() -> None:
    with pytest.raises(Fault, match=r"start_seconds is 12, but the clip ends at 10\.000 s") as caught:
        stretch(300, 30, start_seconds=12)
    assert caught.value.code is ErrorCode.INVALID_JOB


def test_uneven_clip_is_read_at_even_times_not_at_even_indices() -> None:
    shown_at = np.array([0, 0.1, 0.2, 0.3, 8.0, 9.0])
    assert spread_frames(shown_at, find_stretch(shown_at, 10.0, part()), 6) == [0, 3, 3, 3, 3, 5]


def test_single_frame_is_enough() -> None:
    assert spread_frames(np.zeros(1), stretch(1, 25), 1) == [0]
