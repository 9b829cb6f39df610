"""Times of frames, packed: what is unpacked is what was packed, within two kilobytes a result."""

import random
from fractions import Fraction

import pytest

from keye.config.frame_times import MAX_CHARS, pack_all, unpack
from keye.config.outcome import MediaSeen

Clip = tuple[list[int], Fraction]


def read_evenly(pts: list[int], num_frames: int) -> list[int]:
    """The frame on screen at each of evenly spread times."""
    times = [pts[-1] * place / max(num_frames - 1, 1) for place in range(num_frames)]
    return [max(each for each in pts if each <= time) for time in times]


def shaky(num_frames: int, step: int, deviation: float, num_read: int) -> list[int]:
    """A phone's clip of variable rate."""
    draw = random.Random(7)
    pts = [0]
    while len(pts) < num_frames:
        pts.append(pts[-1] + max(1, round(draw.gauss(step, deviation))))
    return read_evenly(pts, num_read)


EXACT: dict[str, Clip] = {
    "one frame": ([0], Fraction(1, 90000)),
    "one later frame": ([3003], Fraction(1, 90000)),
    "one frame again and again": ([512] * 5, Fraction(1, 15360)),
    "a frame before the one before": ([0, 9, 3, 4], Fraction(1, 25)),
    "before the first": ([-3, 0, 3, 7], Fraction(1, 25)),
    "768 of a steady clip": ([7680 * number for number in range(768)], Fraction(1, 15360)),
    "768 of NTSC": (read_evenly([1001 * number for number in range(9000)], 768), Fraction(1, 30000)),
    "768 of a phone's": (shaky(3000, 3003, 600, 768), Fraction(1, 90000)),
    "all of a phone's": (shaky(768, 3003, 90, 768), Fraction(1, 90000)),
    "768 in milliseconds": (read_evenly([round(number * 33.366) for number in range(3000)], 768), Fraction(1, 1000)),
    "cuts here and there": (sorted(random.Random(1).sample(range(9000), 300)), Fraction(1, 25)),
}


@pytest.mark.parametrize("clip", EXACT.values(), ids=EXACT)
def test_times_of_one_clip_come_back_to_the_last_bit(clip: Clip) -> None:
    ticks, tick = clip
    (packed,) = pack_all([clip])
    assert len(packed) <= MAX_CHARS
    assert unpack(packed, len(ticks)) == tuple(float(each * tick) for each in ticks)
    assert "~" not in packed


def test_times_of_64_steady_clips_are_exact_together() -> None:
    clips = [([number * (7 + each) for number in range(12)], Fraction(1, 30)) for each in range(64)]
    packed = pack_all(clips)
    assert sum(map(len, packed)) <= MAX_CHARS
    assert [unpack(each, 12) for each in packed] == [tuple(float(at * t) for at in ticks) for ticks, t in clips]


@pytest.mark.holds("docs/operations.md#was-that-really-what-the-model-saw", "rounded to the finest step that fits")
@pytest.mark.parametrize("num_clips", [2, 8, 64])
def test_what_does_not_fit_is_rounded_by_a_step_that_is_told(num_clips: int) -> None:
    steady = ([7680 * number for number in range(768)], Fraction(1, 15360))
    clips = [(shaky(1000, 3003, 600, 300 + number), Fraction(1, 90000)) for number in range(num_clips - 1)]
    packed = pack_all([steady, *clips])
    assert sum(map(len, packed)) <= MAX_CHARS
    assert packed[0] == "1/2 0 767"
    rounded = [(each, clip) for each, clip in zip(packed[1:], clips, strict=True) if each.startswith("~")]
    assert rounded or num_clips == 2
    for each, (ticks, tick) in rounded:
        step = Fraction(each[1:].split(" ")[0])
        assert step <= Fraction(1, 2)
        errors = [abs(got - at * tick) for got, at in zip(unpack(each, len(ticks)), ticks, strict=True)]
        assert max(errors) <= step / 2 + Fraction(1, 10**9)


def test_times_that_no_clip_has_fit_too() -> None:
    clips = [([0, 2**62, number], Fraction(3, 2)) for number in range(64)]
    assert sum(map(len, pack_all(clips))) <= MAX_CHARS


@pytest.mark.parametrize("packed", ["", "1/30", "1/30 0 x", "1/0 0 5", "1/30 0 9 0 !", "1/30 0 9 0 eJwDAAAAAAE="])
def test_what_is_no_packed_times_is_a_value_error_or_one_of_sums(packed: str) -> None:
    with pytest.raises((ValueError, ZeroDivisionError)):
        unpack(packed, 5)


def test_a_result_tells_them_in_seconds() -> None:
    seen = MediaSeen(type="video", original_size=(9, 9), resized_size=(9, 9), visual_tokens=1)
    assert seen.frame_times_seconds == ()
    seen = seen.model_copy(update={"frames": 31, "frame_times": "1/30 0 450"})
    assert seen.frame_times_seconds[:3] == (0, 0.5, 1)
    assert seen.frame_times_seconds[-1] == 15
