"""Sizes, limits and patches."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from keye.config.codes import ErrorCode
from keye.config.faults import Fault
from keye.worker.model.image_processing import Image, ImageProcessor, Video
from keye.worker.sizing import fit_size

FACTOR = 28
RESIZED = Path(__file__).parents[2] / "golden" / "resized.npz"


@pytest.fixture
def images(preview: Path) -> ImageProcessor:
    return ImageProcessor.from_checkpoint(preview)


@pytest.mark.holds(
    "docs/model.md#pixels",
    "a side below f is raised to f",
    "both sides are rounded to multiples of f;",
    "and rounded down to multiples",
)
@pytest.mark.parametrize(
    ("size", "fitted"),
    [
        ((56, 84), (56, 84)),  # fits as it is
        ((70, 98), (56, 112)),  # 2.5 rounds to the even 2, 3.5 to the even 4
        ((14, 300), (28, 588)),  # a short side is stretched first
        ((1000, 2000), (700, 1400)),  # over the limit: rounded down
        ((40, 40), (56, 56)),  # under the limit: rounded up
    ],
)
def test_sizes_follow_the_rule(size: tuple[int, int], fitted: tuple[int, int]) -> None:
    assert fit_size(*size, factor=FACTOR, min_pixels=3136, max_pixels=1000 * 1000) == fitted


@given(height=st.integers(1, 3000), width=st.integers(1, 3000))
def test_fitted_size_is_whole_factors_within_the_limits(height: int, width: int) -> None:
    try:
        fitted_height, fitted_width = fit_size(height, width, factor=FACTOR, min_pixels=3136, max_pixels=1003520)
    except Fault:
        assert max(height, width) > 100 * min(height, width)
        return
    assert fitted_height % FACTOR == fitted_width % FACTOR == 0
    assert 3136 <= fitted_height * fitted_width <= 1003520


@pytest.mark.holds("docs/model.md#pixels", "more than 200 : 1 is an error;")
def test_extreme_aspect_ratio_is_refused_with_the_ratio() -> None:
    with pytest.raises(Fault, match=r"has 30 x 9000 pixels, an aspect ratio of 300; the limit is 200") as refused:
        fit_size(9000, 30, factor=FACTOR, min_pixels=3136, max_pixels=1003520)
    assert refused.value.code is ErrorCode.MEDIA_UNSUPPORTED


@pytest.mark.holds("docs/model.md#pixels", "Until they are on the model's device they are 8 bits a number")
@pytest.mark.parametrize(
    "numbers",
    [
        {},
        {"image_mean": (0.48145466, 0.4578275, 0.40821073), "image_std": (0.26862954, 0.26130258, 0.27577711)},
        {"image_mean": (0.1, 0.2, 0.3), "image_std": (0.3, 1.0, 3.0), "rescale_factor": 1 / 127.5},
    ],
    ids=["the checkpoint's", "CLIP's", "others"],
)
def test_each_level_is_normalised_to_the_number_of_the_rule_to_the_bit(
    images: ImageProcessor, numbers: dict[str, Any]
) -> None:
    rule = replace(images, **numbers)
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(256, 3, 1, 1)
    expected = levels.astype(np.float32) * np.float32(rule.rescale_factor)
    expected -= np.array(rule.image_mean, np.float32).reshape(3, 1, 1)
    expected /= np.array(rule.image_std, np.float32).reshape(3, 1, 1)
    normalised = rule.normalise(torch.from_numpy(levels)).numpy()
    assert normalised.dtype == np.float32
    assert normalised.tobytes() == expected.tobytes()


@pytest.mark.holds("docs/model.md#pixels", "Patches are [3,14,14], frame by frame")
def test_patches_lie_in_raster_order_channel_first(images: ImageProcessor) -> None:
    pixels = np.zeros((56, 84, 3), dtype=np.uint8)
    pixels[14:28, 28:42, 1] = 255
    patches = images.process_image(Image(pixels))
    assert patches.grids == ((1, 4, 6),)
    bright = np.argwhere(patches.values[:, :, 0, 0] > 0)
    assert bright.tolist() == [[1 * 6 + 2, 1]]
    assert (patches.values.min(), patches.values.max()) == (0, 255)


@pytest.mark.holds(
    "docs/model.md#what-the-released-code-gets-wrong-and-this-does-not",
    "here `Image(…, max_pixels=…)` counts",
)
def test_limits_of_one_image_win_over_the_checkpoints(images: ImageProcessor) -> None:
    pixels = np.zeros((280, 280, 3), dtype=np.uint8)
    assert images.process_image(Image(pixels)).grids == ((1, 12, 12),)
    assert images.process_image(Image(pixels, max_pixels=56 * 56)).grids == ((1, 4, 4),)
    assert images.process_image(Image(pixels, max_pixels=560 * 560)).grids == ((1, 20, 20),)
    assert images.process_image(Image(pixels, size=(56, 112))).grids == ((1, 4, 8),)


@pytest.mark.holds("docs/model.md#pixels", "Then RGB, bicubic")
@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "I;16"])
def test_pictures_of_any_mode_are_read_as_rgb(images: ImageProcessor, mode: str) -> None:
    assert images.process_image(Image(PIL.Image.new(mode, (56, 56)))).values.shape == (16, 3, 14, 14)


@pytest.mark.holds("docs/model.md#pixels", "In 1.5 a size may be given for slow and for fast frames")
@pytest.mark.holds(
    "docs/model.md#how-the-variants-differ",
    "frame sizes in a video | one | slow and fast",
    "one a run of frames of equal size",
)
def test_fast_frames_take_their_own_size_and_equal_neighbours_share_a_grid(v1_5: Path) -> None:
    video = Video(
        np.zeros((5, 60, 60, 3), dtype=np.uint8), frame_types=(0, 0, 1, 1, 0), size=(56, 84), fast_size=(28, 28)
    )
    patches = ImageProcessor.from_checkpoint(v1_5).process_slow_fast_video(video)
    assert patches.grids == ((2, 4, 6), (2, 2, 2), (1, 4, 6))
    assert len(patches.values) == 2 * 24 + 2 * 4 + 24


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        (np.zeros((0, 28, 28, 3), dtype=np.uint8), r"uint8 \[0, 28, 28, 3\], expected uint8 \[T, H, W, 3\]"),
        (np.zeros((2, 3, 28, 28), dtype=np.uint8), r"uint8 \[2, 3, 28, 28\]"),
        (np.zeros((2, 28, 28, 3), dtype=np.float32), r"float32 \[2, 28, 28, 3\]"),
    ],
)
def test_pixels_of_another_shape_are_refused_with_the_shape(
    images: ImageProcessor, frames: np.ndarray, words: str
) -> None:
    with pytest.raises(Fault, match=words) as refused:
        images.process_video(Video(frames))
    assert refused.value.code is ErrorCode.MEDIA_UNSUPPORTED


@pytest.mark.holds("docs/model.md#pixels", "the limits of `preprocessor_config.json`")
def test_limits_saved_under_size_are_read_too(preview: Path, tmp_path: Path) -> None:
    config = json.loads((preview / "preprocessor_config.json").read_text())
    config["size"] = {"min_pixels": config.pop("min_pixels"), "max_pixels": config.pop("max_pixels")}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    assert ImageProcessor.from_checkpoint(tmp_path).max_pixels == config["size"]["max_pixels"]


def test_checkpoint_that_names_no_limits_shows_images_with_256_to_1280_tokens(preview: Path, tmp_path: Path) -> None:
    config = json.loads((preview / "preprocessor_config.json").read_text())
    del config["min_pixels"], config["max_pixels"]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    images = ImageProcessor.from_checkpoint(tmp_path)
    assert (images.min_pixels, images.max_pixels) == (256 * 28 * 28, 1280 * 28 * 28)


@pytest.mark.holds("docs/model.md#pixels", "Then RGB, bicubic (Pillow, 8 bit, the width first and then the height")
@pytest.mark.parametrize("number", range(4))
def test_images_and_frames_are_resized_to_the_pixels_of_the_reference(images: ImageProcessor, number: int) -> None:
    """Of sizes that Pillow 13 by itself brings to other pixels than Pillow 12 did."""
    with np.load(RESIZED) as file:
        source, expected = file[f"source_{number}"], file[f"resized_{number}"]
    limits = {"min_pixels": FACTOR**2, "max_pixels": expected.shape[0] * expected.shape[1]}
    patches = images.process_image(Image(expected, **limits)).values
    assert np.array_equal(images.process_image(Image(source, **limits)).values, patches)
    frames, shown = np.stack([source] * 2), np.concatenate([patches] * 2)
    for process in (images.process_video, images.process_slow_fast_video):
        assert np.array_equal(process(Video(frames, **limits)).values, shown)
