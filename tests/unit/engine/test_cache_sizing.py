"""The step that is tried before the cache is sized; on a GPU its memory is measured, here that it is the largest."""

from pathlib import Path
from typing import Any

import pytest
import torch

from keye.worker.engine.memory import run_largest_step
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
