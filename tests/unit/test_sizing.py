"""How large frames are shown, by the numbers of the official utilities, and how media share what the context leaves."""

import json
from dataclasses import asdict

import pytest

from keye.config.job import ImagePart, VideoPart
from keye.worker.sizing import Sizing

TOKEN = 28 * 28
IMAGE, VIDEO = ImagePart(uri="/image.png"), VideoPart(uri="/clip.mp4")


def sizing(min_tokens: float = 4, max_tokens: float = 16384, **options: int) -> Sizing:
    """Of Preview and with ample room, unless told otherwise."""
    return Sizing(28, int(min_tokens * TOKEN), int(max_tokens * TOKEN), **options)


def slow_fast(**options: int) -> Sizing:
    """Of 1.5."""
    return sizing(splits_video_into_frames=True, **options)


def tokens_of(num_frames: int, images: Sizing | None = None, height: int = 1080, **options: object) -> float:
    part = VideoPart.model_validate({"uri": "/clip.mp4", **options})
    fitted_height, fitted_width = (images or sizing()).fit_frames(part, num_frames, 0, height, height * 16 // 9)[0]
    assert fitted_height % 28 == fitted_width % 28 == 0
    return fitted_height * fitted_width / TOKEN


@pytest.mark.holds("docs/model.md#frames", "but 768 at most and 134.4 (1.05·128) at least")
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
    assert sizing().fit_frames(part, 768, 0, 1080, 1920)[0] == (280, 560)


@pytest.mark.holds("docs/model.md#frames", "so does the checkpoint's where all its images are smaller")
def test_small_checkpoint_keeps_frames_of_the_size_it_was_trained_on() -> None:
    small = sizing(min_tokens=9, max_tokens=17)
    assert small.fit_frames(VideoPart(uri="/clip.mp4"), 4, 0, 84, 84)[0] == (84, 84)
    assert tokens_of(4, small) <= 17


def slow_fast_tokens(num_slow: int, num_fast: int, **options: object) -> tuple[float, float]:
    part = VideoPart.model_validate({"uri": "/clip.mp4", **options})
    slow, fast = slow_fast().fit_frames(part, num_slow, num_fast, 1080, 1920)
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


@pytest.mark.holds(
    "docs/producers.md#how-much-of-a-video-is-read", "smaller frames; Keye-VL-1.5 shows few frames larger"
)
def test_parts_maximum_above_the_models_own_shows_few_frames_larger_and_many_no_larger() -> None:
    assert 768 < slow_fast_tokens(2, 6, max_pixels=2000 * TOKEN)[0] <= 2000
    assert slow_fast_tokens(100, 400, max_pixels=2000 * TOKEN) == slow_fast_tokens(100, 400)


def test_exact_size_is_that_of_slow_frames() -> None:
    part = VideoPart(uri="/clip.mp4", resized_height=280, resized_width=560)
    slow, (fast_height, fast_width) = slow_fast().fit_frames(part, 1, 1, 1080, 1920)
    assert slow == (280, 560)
    assert fast_height * fast_width <= 0.3 * 280 * 560


@pytest.mark.holds("docs/model.md#frames", "makes all of them as large as a slow frame can get")
@pytest.mark.parametrize("num_frames", [1, 2, 90, 300, 768, 2000])
@pytest.mark.parametrize("options", [{}, {"max_pixels": 300 * TOKEN}, {"resized_height": 280, "resized_width": 560}])
def test_frames_are_decoded_no_smaller_than_any_split_shows_them(num_frames: int, options: dict[str, int]) -> None:
    part = VideoPart(uri="/clip.mp4", **options)
    decoded = slow_fast(video_tokens=10**6).fit_video(part, num_frames, 1080, 1920).size
    for num_slow in {1, (num_frames + 1) // 2, num_frames}:
        slow, fast = slow_fast().fit_frames(part, num_slow, num_frames - num_slow, 1080, 1920)
        assert all(side <= most for size in (slow, fast) for side, most in zip(size, decoded, strict=True))


def test_flat_frames_keep_at_least_a_token_in_height() -> None:
    part = VideoPart(uri="/clip.mp4", max_pixels=3 * TOKEN)
    assert min(sizing().fit_frames(part, 4, 0, 100, 1000)[0]) >= 28


@pytest.mark.holds("docs/from-a-script.md#a-video", "What does not fit into the model's context")
@pytest.mark.holds("docs/producers.md#how-much-of-a-video-is-read", "What would not fit into the model's context")
@pytest.mark.holds(
    "docs/model.md#frames",
    "where that leaves too little for what follows, frames get smaller, then fewer",
)
def test_context_first_makes_frames_smaller_then_fewer() -> None:
    part = VideoPart(uri="/clip.mp4")
    ample = sizing(video_tokens=10**6).fit_video(part, 40, 1080, 1920)
    assert ample == (40, ample.size, ample.size)
    smaller = sizing(video_tokens=10_000).fit_video(part, 40, 1080, 1920)
    assert smaller.num_frames == 40
    assert smaller.ample_size == ample.size
    assert 0.8 * 10_000 < 40 * smaller.size[0] * smaller.size[1] / TOKEN <= 10_000
    fewer = sizing(video_tokens=3_000).fit_video(part, 40, 1080, 1920)
    assert fewer.num_frames < 40
    assert 0.8 * 3_000 < fewer.num_frames * fewer.size[0] * fewer.size[1] / TOKEN <= 3_000


def test_exact_size_is_kept_and_frames_are_left_out_instead() -> None:
    part = VideoPart(uri="/clip.mp4", resized_height=280, resized_width=560)
    assert sizing(video_tokens=3000).fit_video(part, 40, 1080, 1920) == (15, (280, 560), (280, 560))


def test_one_frame_is_shown_however_little_room_there_is() -> None:
    assert sizing(video_tokens=0).fit_video(VideoPart(uri="/clip.mp4"), 40, 1080, 1920).num_frames == 1


def test_many_frames_of_hd_are_shown_reduced() -> None:
    assert 230 < tokens_of(100, content="hd") <= 256
    assert tokens_of(100, content="hd", max_pixels=500 * TOKEN) > 256


@pytest.mark.parametrize("room", [2_000, 10_000, 40_000])
@pytest.mark.parametrize(("height", "width"), [(1080, 1920), (90, 160), (1920, 1080), (120, 1000)])
def test_slow_and_fast_frames_of_any_split_fit_the_context_with_their_marks(room: int, height: int, width: int) -> None:
    part = VideoPart(uri="/clip.mp4")
    for num_frames in (1, 8, 60, 768):
        fit = slow_fast(video_tokens=room).fit_video(part, num_frames, height, width)
        for num_slow in {1, fit.num_frames // 2 or 1, fit.num_frames}:
            num_fast = fit.num_frames - num_slow
            slow, fast = slow_fast(video_tokens=room).fit_frames(part, num_slow, num_fast, height, width)
            num_tokens = num_slow * slow[0] * slow[1] / TOKEN + num_fast * fast[0] * fast[1] / TOKEN
            assert num_tokens + 9 * fit.num_frames <= room
            assert all(side <= most for size in (slow, fast) for side, most in zip(size, fit.size, strict=True))


def test_room_that_is_ample_changes_no_size() -> None:
    part = VideoPart(uri="/clip.mp4")
    for split in ((1, 0), (10, 30), (200, 500)):
        sizes = slow_fast(video_tokens=10**6).fit_frames(part, *split, 720, 1280)
        assert sizes == slow_fast().fit_frames(part, *split, 720, 1280)


def test_one_video_has_the_whole_room() -> None:
    assert sizing().share([VIDEO], 30_000).video_tokens == 30_000


@pytest.mark.holds("docs/producers.md#how-much-of-a-video-is-read", "what images cannot use goes to the videos")
def test_videos_get_what_images_cannot_use() -> None:
    images = sizing(max_tokens=1280)
    shared = images.share([IMAGE, VIDEO, VIDEO], 30_000)
    assert (shared.image_tokens, shared.video_tokens) == (10_000, (30_000 - 1280) // 2)
    small = ImagePart(uri="/image.png", max_pixels=100 * TOKEN)
    assert images.share([small, VIDEO], 30_000).video_tokens == 29_900


def test_many_large_images_get_equal_shares() -> None:
    assert sizing(max_tokens=1280).share([IMAGE] * 64, 32_000).image_tokens == 500


def test_text_that_fills_the_context_leaves_nothing() -> None:
    shared = sizing().share([IMAGE, VIDEO], -5)
    assert (shared.image_tokens, shared.video_tokens) == (0, 0)


def test_decoder_children_are_told_the_same_rule() -> None:
    shared = slow_fast().share([IMAGE, VIDEO], 1000)
    assert Sizing(**json.loads(json.dumps(asdict(shared)))) == shared
