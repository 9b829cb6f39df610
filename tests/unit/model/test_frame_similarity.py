"""Slow and fast frames of 1.5: which they are and how large, against the official utilities on lists of frames."""

import numpy as np
import PIL.Image
import pytest
from keye_vl_utils import process_vision_info
from keye_vl_utils.vision_process import extract_slow_fast_frames
from torch import from_numpy

from keye.config.job import VideoPart
from keye.worker.model.image_processing import tell_slow_from_fast
from keye.worker.sizing import Sizing

SIZING = Sizing(28, 4 * 784, 16384 * 784, splits_video_into_frames=True)


def draw_scenes(rng: np.random.Generator, num_frames: int, height: int, width: int) -> np.ndarray:
    """Mosaics of flat colours; from frame to frame none, a few or all of the cells change."""
    cells = (-(-height // 40), -(-width // 40))
    mosaic = rng.choice(np.array([0, 80, 255], np.uint8), (*cells, 3))
    frames = []
    for _ in range(num_frames):
        changes = rng.random(cells) < rng.choice([0, 0, 0.04, 0.1, 0.2, 1])
        mosaic = np.where(changes[..., None], rng.choice(np.array([0, 80, 255], np.uint8), (*cells, 3)), mosaic)
        frames.append(mosaic.repeat(40, axis=0).repeat(40, axis=1)[:height, :width])
    return np.stack(frames)


@pytest.mark.holds(
    "docs/model.md#frames",
    "each next one is compared with the latest slow frame",
    "`keye-vl-utils` 1.5.2 makes this decision here too",
)
@pytest.mark.parametrize("seed", range(12))
def test_decisions_and_sizes_are_those_of_the_utilities(seed: int) -> None:
    rng = np.random.default_rng(seed)
    options = [{}, {}, {"max_pixels": 90 * 784}, {"min_pixels": 100 * 784, "max_pixels": 300 * 784}][seed % 4]
    height, width = (int(side) for side in rng.integers(60, 500, 2))
    drawn = draw_scenes(rng, int(rng.integers(1, 20)), height, width)
    pictures = [PIL.Image.fromarray(frame) for frame in drawn]
    part = {"type": "video", "video": pictures, "fps": 2.0, **options}
    _, (frames,), expected = process_vision_info([{"role": "user", "content": [part]}])

    types = tell_slow_from_fast(frames.permute(0, 2, 3, 1).numpy())

    assert types == tuple(expected["frame_types"][0].tolist())
    sizes = SIZING.fit_frames(VideoPart(uri="/clip.mp4", **options), types.count(0), types.count(1), *frames.shape[2:])
    names = ("height", "width", "fast_height", "fast_width")
    assert (*sizes[0], *sizes[1]) == tuple(expected[name][0] for name in names)


def test_long_videos_are_split_as_in_one_call() -> None:
    """The comparison goes on from window to window as if there were none."""
    frames = draw_scenes(np.random.default_rng(99), 150, 84, 112)
    whole = extract_slow_fast_frames(from_numpy(frames).permute(0, 3, 1, 2)).tolist()
    assert 20 < sum(whole) < 140
    assert tell_slow_from_fast(frames) == tuple(whole)


@pytest.mark.holds("docs/model.md#frames", "The first is slow;")
def test_black_video_has_one_slow_frame() -> None:
    assert tell_slow_from_fast(np.zeros((3, 280, 280, 3), np.uint8)) == (0, 1, 1)


@pytest.mark.holds("docs/model.md#frames", "Frames that are one row of patches then are all slow.")
def test_frames_too_flat_for_the_utilities_are_all_slow() -> None:
    frames = draw_scenes(np.random.default_rng(1), 3, 28, 1400)
    assert tell_slow_from_fast(frames) == (0, 0, 0)
