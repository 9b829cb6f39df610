"""The step that is tried before the cache is sized; on a GPU its memory is measured, here that it is the largest."""

from pathlib import Path
from typing import Any

import pytest
import torch

from keye.worker.engine import memory
from keye.worker.engine.memory import cache_bytes_within, row_bytes, run_largest_step, run_long_video
from keye.worker.engine.step_plan import StepLimits
from keye.worker.model.load import load_model
from keye.worker.model.processor import KeyeProcessor

CHECKPOINT = Path(__file__).parents[2] / "golden" / "preview" / "checkpoint"


def test_largest_step_fills_its_tokens_with_the_largest_images(monkeypatch: pytest.MonkeyPatch) -> None:
    processor = KeyeProcessor.from_checkpoint(CHECKPOINT)
    processor.image_processor.max_pixels = 60 * 28 * 28
    model = load_model(CHECKPOINT, dtype=torch.float32)
    sizes: dict[str, Any] = {}
    for name, part in (("tower", model.visual), ("decoder", model.model), ("head", model.lm_head)):
        part.register_forward_hook(lambda _, args, __, name=name: sizes.update({name: args[0].shape}))
    run_largest_step(model, processor, StepLimits(max_running=5, max_step_tokens=100))
    # 7 x 7 tokens an image: two fill 100 tokens all but two, and one more is reached.
    assert sizes["tower"][0] == 3 * 4 * 49
    assert sizes["decoder"][1] == 100
    assert sizes["head"][0] == 5


def test_step_of_many_images_is_no_more_than_the_tower_takes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MAX_PATCHES", 400)
    processor = KeyeProcessor.from_checkpoint(CHECKPOINT)
    processor.image_processor.max_pixels = 60 * 28 * 28
    model = load_model(CHECKPOINT, dtype=torch.float32)
    run_largest_step(model, processor, StepLimits(max_running=5, max_step_tokens=500))
    assert model.most_patches == 2 * 4 * 49


def test_long_video_is_tried_whole_by_a_single_layer_and_all_layers_are_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "LONG_VIDEO_PATCHES", 2048)
    model = load_model(CHECKPOINT, dtype=torch.float32)
    layers = list(model.visual.vision_model.encoder.layers)
    passed: list[torch.Size] = []
    for layer in layers:
        layer.register_forward_hook(lambda _, args, __: passed.append(args[0].shape))
    run_long_video(model)
    assert [shape[0] for shape in passed] == [2048]
    assert list(model.visual.vision_model.encoder.layers) == layers


# Bytes, as the 8B models have them: a token in the cache, one of a video in the tower, a step; and their contexts.
TOKEN, VIDEO_TOKEN, STEP = 147_456, 4 * 12_000, 400 * 2**20


@pytest.mark.parametrize("gibibytes", [1, 2, 4, 8, 50])
@pytest.mark.parametrize(("video_token", "context"), [(VIDEO_TOKEN, 40_960), (0, 131_072)], ids=["preview", "1.5"])
def test_cache_leaves_room_for_rows_and_a_step_and_for_any_video_it_could_hold(
    gibibytes: int, video_token: int, context: int
) -> None:
    room = gibibytes * 2**30

    def needed(cache: float) -> float:
        return cache + row_bytes(int(cache)) + max(STEP, video_token * min(context, cache / TOKEN))

    cache = cache_bytes_within(room, STEP, TOKEN, video_token, context)
    assert needed(cache) <= room + 1
    assert needed(1.001 * cache) > room


def test_cache_is_none_where_there_is_no_room_for_a_step() -> None:
    assert cache_bytes_within(STEP // 2, STEP, TOKEN, VIDEO_TOKEN, 40_960) < 0
