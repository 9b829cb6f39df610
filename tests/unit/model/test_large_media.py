"""Images and videos that are too large, or too many, to go through the tower all at once."""

from math import prod
from pathlib import Path

import pytest
import torch

from keye.worker.engine.model_memory import AliveTensors
from keye.worker.model import vision_tower
from keye.worker.model.load import load_model

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
