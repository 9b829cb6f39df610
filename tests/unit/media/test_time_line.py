"""What is made of the times that packets tell, true or not."""

from contextlib import suppress
from fractions import Fraction

import numpy as np
import pytest

from keye.worker.media.faults import MediumFault
from keye.worker.media.frames.time_line import MISSING, Packets, TimeLine, lay_out

MILLISECONDS = Fraction(1, 1000)
STEP = 40
NUM = 50


def line_of(
    pts: list[int], dts: list[int] | None = None, demuxer: str = "mov", keyframe_every: int = 10, duration: int = STEP
) -> TimeLine:
    num = len(pts)
    packets = Packets(
        pts=np.array(pts, np.int64),
        dts=np.array(pts if dts is None else dts, np.int64),
        durations=np.full(num, duration, np.int64),
        sizes=np.ones(num, np.int64),
        are_keyframes=np.arange(num) % keyframe_every == 0,
        are_discarded=np.zeros(num, bool),
    )
    return lay_out(packets, demuxer, MILLISECONDS, Fraction(25))


STEADY = [STEP * number for number in range(NUM)]


def test_an_ordinary_clock_is_left_alone() -> None:
    for demuxer in ("mov", "matroska", "mpegts"):
        line = line_of(STEADY, demuxer=demuxer)
        assert line.is_as_stored
        assert line.pts.tolist() == STEADY


@pytest.mark.holds(
    "docs/operations.md#which-media-does-a-worker-read", "a leap ahead of more than ten seconds is a jump"
)
@pytest.mark.parametrize("demuxer", ["mov", "matroska", "avi", "flv", "asf", "mpegts", "mpeg", "ogg"])
def test_a_picture_may_stand_for_minutes_but_in_containers_that_are_joined_as_they_come(demuxer: str) -> None:
    later = [pts + 120_000 * (number >= 25) for number, pts in enumerate(STEADY)]
    line = line_of(later, demuxer=demuxer)
    if demuxer in ("mpegts", "mpeg", "ogg"):
        assert line.joins == (25,)
        assert line.pts.tolist() == STEADY
    else:
        assert line.is_as_stored
    almost = [pts + 9_000 * (number >= 25) for number, pts in enumerate(STEADY)]
    assert line_of(almost, demuxer=demuxer).is_as_stored


@pytest.mark.parametrize("demuxer", ["mov", "matroska", "avi", "flv", "asf", "mpegts", "mpeg", "ogg"])
@pytest.mark.parametrize("begin", [0, -5_000, 1_900, 2**33])
def test_a_restart_is_followed_in_every_container(demuxer: str, begin: int) -> None:
    twice = [2**33 + pts for pts in STEADY] + [begin + pts for pts in STEADY]
    line = line_of(twice, demuxer=demuxer)
    assert line.joins == (NUM,)
    assert line.pts.tolist() == [2**33 + STEP * number for number in range(2 * NUM)]


def test_frames_that_are_shown_in_another_order_than_they_are_stored_are_no_jumps() -> None:
    # A slide every two minutes, three B-frames after each P-frame.
    pts = [120_000 * (4 * group + place) for group in range(12) for place in (4, 1, 2, 3)]
    for demuxer in ("matroska", "mov"):
        line = line_of([0, *pts], [MISSING] * 49 if demuxer == "matroska" else STEADY[:49], demuxer, keyframe_every=99)
        assert line.is_as_stored


@pytest.mark.parametrize("lie", [2**62, -(2**62), 2**63 - 1, 3_600_000 * 24 * 365, -3_600_000 * 24 * 365])
@pytest.mark.parametrize("demuxer", ["mov", "matroska", "mpegts", "flv"])
@pytest.mark.parametrize("at", [0, 13, 20, NUM - 1])
def test_one_lie_moves_no_other_frame_and_makes_no_years(demuxer: str, lie: int, at: int) -> None:
    told = [lie if number == at else pts for number, pts in enumerate(STEADY)]
    line = line_of(told, demuxer=demuxer)
    shown = np.sort(line.pts[line.are_shown])
    assert len(shown) >= NUM - (10 if at == 0 else 1)
    assert np.all(np.diff(shown) > 0)
    assert np.ptp(shown) <= (NUM + 1) * STEP


@pytest.mark.parametrize("demuxer", ["mov", "matroska", "mpegts"])
@pytest.mark.parametrize("limit", [2**20, 2**50, 2**62])
def test_lies_without_end_are_bounded_or_refused(demuxer: str, limit: int) -> None:
    pts, dts = np.random.default_rng(3).integers(-limit, limit, (2, 300)).tolist()
    with suppress(MediumFault):
        line = line_of(pts, dts, demuxer, duration=2**61)
        shown = np.sort(line.pts[line.are_shown])
        assert np.all(np.diff(shown) > 0)
        assert abs(int(shown[-1]) - int(shown[0])) < 2**62


def test_frames_of_one_time_stay_two_frames() -> None:
    told = [0, 40, 40, 40, 80, 80, 120]
    line = line_of(told, STEADY[:7], keyframe_every=1)
    assert line.pts.tolist() == [0, 40, 41, 42, 80, 81, 120]
    assert not line.is_as_stored


def test_what_comes_before_the_first_keyframe_and_what_needs_more_than_that_is_not_shown() -> None:
    pts = [0, 40, 80, 240, 160, 200, 280]
    packets = Packets(
        pts=np.array(pts),
        dts=np.array(STEADY[:7]),
        durations=np.full(7, STEP),
        sizes=np.ones(7, np.int64),
        are_keyframes=np.arange(7) == 3,
        are_discarded=np.zeros(7, bool),
    )
    line = lay_out(packets, "mpegts", MILLISECONDS, None)
    assert line.pts[line.are_shown].tolist() == [240, 280]
    assert np.flatnonzero(line.are_read).tolist() == [3, 6]


def test_without_any_time_frames_follow_each_other_at_the_stream_s_rate() -> None:
    nothing = [MISSING] * NUM
    line = line_of(nothing, nothing, "h264", duration=0)
    assert line.counts
    assert line.pts.tolist() == STEADY
