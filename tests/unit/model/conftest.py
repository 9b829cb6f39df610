"""The golden cases: what the reference was given and what it answered. `tests/golden/README.md` describes the files."""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor

from keye.worker.model.image_processing import Image, Video
from keye.worker.model.keye import KeyeForConditionalGeneration
from keye.worker.model.load import load_model
from keye.worker.model.processor import KeyeProcessor
from keye.worker.proof.golden_case import GENERATIONS, GoldenCase
from keye.worker.sizing import resize

GOLDEN = Path(__file__).parents[2] / "golden"
torch.set_num_threads(2)


@lru_cache(maxsize=8)
def golden_model(checkpoint: Path) -> KeyeForConditionalGeneration:
    return load_model(checkpoint, dtype=torch.float32)


@lru_cache(maxsize=8)
def golden_processor(checkpoint: Path) -> KeyeProcessor:
    return KeyeProcessor.from_checkpoint(checkpoint)


class TestedCase(GoldenCase):
    """One whose pixels may have gone through the official vision utilities first, with the model's answers at hand."""

    @property
    def model(self) -> KeyeForConditionalGeneration:
        return golden_model(self.generation / "checkpoint")

    @property
    def processor(self) -> KeyeProcessor:
        return golden_processor(self.generation / "checkpoint")

    @property
    def attention_mask(self) -> Tensor:
        return self.arrays["attention_mask"].bool()

    def model_inputs(self, *names: str) -> dict[str, Tensor]:
        """The stored processor outputs that the model reads, with the arrays named besides."""
        visual = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "second_per_grid_ts")
        wanted = ("input_ids", "attention_mask", *visual, *names)
        return {name: self.arrays[name] for name in wanted if name in self.arrays}

    @property
    def _video_kwargs(self) -> dict[str, Any]:
        utils = self.facts.get("utils_output") or {}
        return {**super()._video_kwargs, **(utils.get("video_kwargs") or {})}

    def _media(self) -> Iterator[Image | Video]:
        utils = self.facts.get("utils_output")
        if not utils:
            yield from super()._media()
            return
        image_sizes = iter(utils.get("image_sizes_wh", ()))
        video_shapes = iter(utils.get("video_shapes_tchw", ()))
        for medium in super()._media():
            if isinstance(medium, Image):
                yield Image(resize(medium.pixels.convert("RGB"), *next(image_sizes)))
            else:
                yield replace(medium, frames=_as_the_utilities_left_them(medium.frames, next(video_shapes)))


def _as_the_utilities_left_them(frames: np.ndarray, shape_tchw: list[int]) -> np.ndarray:
    count, _, height, width = shape_tchw
    if count <= len(frames):
        chosen = np.linspace(0, len(frames) - 1, count).round().astype(int)
    else:  # Preview's utilities repeat the last frame to an even number
        chosen = np.minimum(np.arange(count), len(frames) - 1)
    return np.stack([np.asarray(resize(PIL.Image.fromarray(frames[i]), width, height)) for i in chosen])


def golden_cases() -> list[TestedCase]:
    """Those that ship and those beside them here; or those of `KEYE_GOLDEN_DIR`, whose index names them."""
    if "KEYE_GOLDEN_DIR" not in os.environ:
        folders = [*GENERATIONS.values(), GOLDEN / "preview", GOLDEN / "v1_5"]
        return [case for folder in folders for case in TestedCase.of(folder)]
    root = Path(os.environ["KEYE_GOLDEN_DIR"])
    folders = [root] if (root / "index.json").is_file() else sorted(index.parent for index in root.glob("*/index.json"))
    assert folders, f"KEYE_GOLDEN_DIR {root} holds no index.json, neither itself nor in a folder of it"
    indices = [json.loads((folder / "index.json").read_text(encoding="utf-8")) for folder in folders]
    return [
        TestedCase(folder, entry["name"])
        for folder, index in zip(folders, indices, strict=True)
        for entry in index["cases"]
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = golden_cases()
    if "golden_case" in metafunc.fixturenames:
        metafunc.parametrize("golden_case", cases, ids=lambda case: f"{case.generation.name}-{case.name}")
    if "golden_checkpoint" in metafunc.fixturenames:
        checkpoints = {case.generation.name: case.generation / "checkpoint" for case in cases}
        metafunc.parametrize("golden_checkpoint", checkpoints.values(), ids=checkpoints)


@pytest.fixture
def preview() -> Path:
    """The small Preview checkpoint that ships with the tests."""
    return GOLDEN / "preview" / "checkpoint"


@pytest.fixture
def v1_5() -> Path:
    return GOLDEN / "v1_5" / "checkpoint"


@pytest.fixture
def model(preview: Path) -> KeyeForConditionalGeneration:
    return golden_model(preview)


@pytest.fixture
def processor(preview: Path) -> KeyeProcessor:
    return golden_processor(preview)
