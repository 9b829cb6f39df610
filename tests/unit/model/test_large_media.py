"""Images and videos that are too large, or too many, to go through the tower all at once."""

import tracemalloc
import weakref
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from keye.worker.engine.model_memory import AliveTensors
from keye.worker.model import vision_tower
from keye.worker.model.image_processing import ImageProcessor, Video
from keye.worker.model.load import load_model
from keye.worker.model.processor import KeyeProcessor

GOLDEN = Path(__file__).parents[2] / "golden"
GRIDS = [[3, 4, 6], [1, 2, 2], [2, 8, 4], [1, 2, 2]]


@pytest.mark.holds("docs/model.md#vision-tower", "in groups of whole items")
@pytest.mark.parametrize("generation", ["preview", "v1_5"])
@pytest.mark.parametrize("kind", ["image", "video"])
@torch.inference_mode()
def test_features_do_not_depend_on_how_many_patches_go_through_at_once(
    generation: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(GOLDEN / generation / "checkpoint", dtype=torch.float32)
    encode = getattr(model, f"get_{kind}_features")
    torch.manual_seed(0)
    patches = torch.randn(sum(map(prod, GRIDS)), 3, 14, 14)
    expected = encode(patches, GRIDS)
    seen = []
    model.visual.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    monkeypatch.setattr(vision_tower, "MAX_PATCHES", 20)
    torch.testing.assert_close(encode(patches, GRIDS), expected, atol=1e-5, rtol=0)
    # An item is alone where it has more; only Preview's videos and images do, the others' frames come in groups.
    assert max(seen) == (32 if (generation, kind) == ("v1_5", "video") else 72)
    assert len(seen) > 2


@pytest.mark.parametrize("max_patches", [20, 1000], ids=["in-parts", "at-once"])
@torch.inference_mode()
def test_bytes_are_seen_as_what_they_are_normalised_to(max_patches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(GOLDEN / "preview" / "checkpoint", dtype=torch.float32)
    monkeypatch.setattr(vision_tower, "MAX_PATCHES", max_patches)
    patches = torch.randint(0, 256, (sum(map(prod, GRIDS)), 3, 14, 14), dtype=torch.uint8)
    normalised = ImageProcessor.from_checkpoint(GOLDEN / "preview" / "checkpoint").normalise(patches)
    assert torch.equal(model.get_video_features(patches, GRIDS), model.get_video_features(normalised, GRIDS))
    model.visual.vision_model.embeddings.normalise = None
    with pytest.raises(ValueError, match="patches are uint8"):
        model.get_video_features(patches, GRIDS)


@pytest.mark.parametrize("generation", ["preview", "v1_5"])
def test_frames_of_a_video_are_copied_once_and_not_held(generation: str) -> None:
    """They may be 100 MB, and another job's too. Slow and fast ones in turn are a run each."""
    processor = KeyeProcessor.from_checkpoint(GOLDEN / generation / "checkpoint")
    messages = [{"role": "user", "content": [{"type": "video"}]}]
    sizes: Any = {"max_pixels": 224**2, "size": (224, 224), "fast_size": (112, 112), "frame_types": (0, 1) * 32}
    video = Video(np.full((64, 224, 224, 3), 7, np.uint8), **sizes)
    video.frames.setflags(write=False)
    frames = weakref.ref(video.frames)
    processor.prepare(messages, videos=[video])  # the first time more is allocated, and kept
    tracemalloc.start()
    try:
        prompt = processor.prepare(messages, videos=[video])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    del video
    assert frames() is None
    assert prompt.pixel_values_videos is not None
    assert prompt.pixel_values_videos.dtype == torch.uint8
    assert peak < 1.5 * prompt.pixel_values_videos.nbytes


@pytest.mark.holds("docs/model.md#vision-tower", "A video of Preview with more is one item all the same")
@torch.inference_mode()
def test_long_video_takes_memory_only_for_what_its_attention_needs_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states, queries, keys, values and outputs, and the angles of its patches."""
    model = load_model(GOLDEN / "preview" / "checkpoint", dtype=torch.float32)
    monkeypatch.setattr(vision_tower, "MAX_PATCHES", 64)
    vision = model.config.vision_config
    whole = 4 * (5 * vision.hidden_size + 2 * vision.hidden_size // vision.num_attention_heads)
    peaks = []
    for num_frames in (32, 64):
        patches = torch.zeros(num_frames * 16, 3, 14, 14)
        with AliveTensors("cpu") as memory:
            model.get_video_features(patches, [[num_frames, 4, 4]])
        peaks.append(memory.peak)
    assert (peaks[1] - peaks[0]) / (32 * 16) <= 1.05 * whole
