"""How large the frames of a video are shown, by the numbers of the official utilities."""

import pytest

from config.job import VideoPart
from worker.model.frame_budget import fit_frame, fit_slow_fast, largest_frame
from worker.model.image_processing import ImageProcessor

TOKEN = 28 * 28


def processor(min_tokens: float = 4, max_tokens: float = 16384) -> ImageProcessor:
    return ImageProcessor(
        min_pixels=int(min_tokens * TOKEN),
        max_pixels=int(max_tokens * TOKEN),
        patch_size=14,
        merge_size=2,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
    )


def tokens_of(num_frames: int, images: ImageProcessor | None = None, height: int = 1080, **options: object) -> float:
    part = VideoPart.model_validate({"uri": "/clip.mp4", **options})
    fitted_height, fitted_width = fit_frame(images or processor(), part, num_frames, height, height * 16 // 9)
    assert fitted_height % 28 == fitted_width % 28 == 0
    return fitted_height * fitted_width / TOKEN


@pytest.mark.parametrize(
    ("num_frames", "most"),
    [(4, 768), (300, 768), (400, 2 * 0.9 * 128_000 / 400), (768, 2 * 0.9 * 128_000 / 768), (4096, 1.05 * 128)],
)
def test_frames_share_the_videos_budget(num_frames: int, most: float) -> None:
    assert 0.85 * most < tokens_of(num_frames) <= most


def test_small_frames_are_enlarged_to_the_least_a_frame_may_have() -> None:
    assert 128 <= tokens_of(4, height=90) < 150


def test_parts_limit_narrows_the_budget_and_never_widens_it() -> None:
    assert tokens_of(4, max_pixels=200 * TOKEN) <= 200
    assert tokens_of(4, max_pixels=50 * TOKEN) <= 50
    assert tokens_of(4, max_pixels=5000 * TOKEN) <= 768


def test_exact_size_is_met_whatever_the_budget() -> None:
    part = VideoPart(uri="/clip.mp4", resized_height=280, resized_width=560)
    assert fit_frame(processor(), part, 768, 1080, 1920) == (280, 560)


def test_small_checkpoint_keeps_frames_of_the_size_it_was_trained_on() -> None:
    small = processor(min_tokens=9, max_tokens=17)
    assert fit_frame(small, VideoPart(uri="/clip.mp4"), 4, 84, 84) == (84, 84)
    assert tokens_of(4, small) <= 17


def slow_fast_tokens(num_slow: int, num_fast: int, **options: object) -> tuple[float, float]:
    part = VideoPart.model_validate({"uri": "/clip.mp4", **options})
    slow, fast = fit_slow_fast(processor(), part, num_slow, num_fast, 1080, 1920)
    return slow[0] * slow[1] / TOKEN, fast[0] * fast[1] / TOKEN


def test_fast_frames_have_three_tenths_of_a_slow_frames_tokens() -> None:
    slow, fast = slow_fast_tokens(2, 6)
    assert 700 < slow <= 768
    assert 0.25 * slow < fast <= 0.3 * slow


def test_long_slow_fast_videos_stay_within_the_budget() -> None:
    slow, fast = slow_fast_tokens(100, 400)
    assert 55_000 < 100 * slow + 400 * fast <= 65_536


def test_frames_no_longer_shrink_when_all_have_the_least() -> None:
    slow, fast = slow_fast_tokens(2000, 2000)
    assert 40 <= fast <= slow <= 48


def test_parts_maximum_holds_for_slow_and_fast_frames() -> None:
    assert max(slow_fast_tokens(2, 6, max_pixels=100 * TOKEN)) <= 100
    assert max(slow_fast_tokens(2, 6, max_pixels=20 * TOKEN)) <= 20


def test_exact_size_is_that_of_slow_frames() -> None:
    part = VideoPart(uri="/clip.mp4", resized_height=280, resized_width=560)
    slow, (fast_height, fast_width) = fit_slow_fast(processor(), part, 1, 1, 1080, 1920)
    assert slow == (280, 560)
    assert fast_height * fast_width <= 0.3 * 280 * 560


@pytest.mark.parametrize("num_frames", [1, 2, 90, 300, 768, 2000])
@pytest.mark.parametrize("options", [{}, {"max_pixels": 300 * TOKEN}, {"resized_height": 280, "resized_width": 560}])
def test_frames_are_decoded_no_smaller_than_any_split_shows_them(num_frames: int, options: dict[str, int]) -> None:
    part = VideoPart(uri="/clip.mp4", **options)
    decoded = largest_frame(processor(), part, num_frames, 1080, 1920)
    for num_slow in {1, (num_frames + 1) // 2, num_frames}:
        slow, fast = fit_slow_fast(processor(), part, num_slow, num_frames - num_slow, 1080, 1920)
        assert all(side <= most for size in (slow, fast) for side, most in zip(size, decoded, strict=True))


def test_flat_frames_keep_at_least_a_token_in_height() -> None:
    part = VideoPart(uri="/clip.mp4", max_pixels=3 * TOKEN)
    assert min(fit_frame(processor(), part, 4, 100, 1000)) >= 28
