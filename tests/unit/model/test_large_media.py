"""Images and videos that are too large, or too many, to go through the tower all at once."""

import weakref
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from keye.worker.model import vision_tower
from keye.worker.model.load import load_model

GOLDEN = Path(__file__).parents[2] / "golden"
GRIDS = [[3, 4, 6], [1, 2, 2], [2, 8, 4], [1, 2, 2]]


class PeakMemory(TorchDispatchMode):
    """Bytes of the tensors that were alive at the same time, of those made within."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage._cdata for storage in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage._cdata not in given | self._alive.keys():
                self._alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self._alive.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self._alive.values()))
        return result


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


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
        with PeakMemory() as memory:
            model.get_video_features(patches, [[num_frames, 4, 4]])
        peaks.append(memory.peak)
    assert (peaks[1] - peaks[0]) / (32 * 16) <= 1.05 * whole
