"""Media share what the context leaves: equal shares, and what images cannot use goes to the videos."""

from keye.config.job import ImagePart, VideoPart
from keye.worker.model.visual_budget import VisualBudget, share_context
from tests.unit.model.test_frame_budget import TOKEN, processor

IMAGE, VIDEO = ImagePart(uri="/image.png"), VideoPart(uri="/clip.mp4")


def test_one_video_has_the_whole_room() -> None:
    assert share_context(processor(), [VIDEO], 30_000).video_tokens == 30_000


def test_videos_get_what_images_cannot_use() -> None:
    images = processor(max_tokens=1280)
    assert share_context(images, [IMAGE, VIDEO, VIDEO], 30_000) == VisualBudget(10_000, (30_000 - 1280) // 2)
    small = ImagePart(uri="/image.png", max_pixels=100 * TOKEN)
    assert share_context(images, [small, VIDEO], 30_000).video_tokens == 29_900


def test_many_large_images_get_equal_shares() -> None:
    assert share_context(processor(max_tokens=1280), [IMAGE] * 64, 32_000).image_tokens == 500


def test_text_that_fills_the_context_leaves_nothing() -> None:
    assert share_context(processor(), [IMAGE, VIDEO], -5) == VisualBudget(0, 0)
