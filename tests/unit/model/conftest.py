"""The golden cases: what the reference was given and what it answered. `tests/golden/README.md` describes the files."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
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
from keye.worker.model.processor import KeyeProcessor, PreparedPrompt
from keye.worker.sizing import resize

GOLDEN = Path(__file__).parents[2] / "golden"
torch.set_num_threads(2)


@lru_cache(maxsize=8)
def golden_model(checkpoint: Path) -> KeyeForConditionalGeneration:
    return load_model(checkpoint, dtype=torch.float32)


@lru_cache(maxsize=8)
def golden_processor(checkpoint: Path) -> KeyeProcessor:
    return KeyeProcessor.from_checkpoint(checkpoint)


@dataclass(frozen=True)
class GoldenCase:
    variant: Path
    name: str

    @cached_property
    def facts(self) -> dict[str, Any]:
        return json.loads((self.variant / "cases" / f"{self.name}.json").read_text(encoding="utf-8"))

    @cached_property
    def arrays(self) -> dict[str, Tensor]:
        with np.load(self.variant / "cases" / f"{self.name}.npz") as file:
            return {name: torch.from_numpy(file[name]) for name in file.files}

    @property
    def model(self) -> KeyeForConditionalGeneration:
        return golden_model(self.variant / "checkpoint")

    @property
    def processor(self) -> KeyeProcessor:
        return golden_processor(self.variant / "checkpoint")

    @property
    def conversations(self) -> list[list[dict[str, Any]]]:
        return self.facts["messages"] if self.facts["batch"] else [self.facts["messages"]]

    @property
    def has_exact_frame_sizes(self) -> bool:
        """Frames resized on a tensor to sizes the caller chose, not by Pillow."""
        return "height" in self._video_kwargs

    @property
    def attention_mask(self) -> Tensor:
        return self.arrays["attention_mask"].bool()

    def model_inputs(self, *names: str) -> dict[str, Tensor]:
        """The stored processor outputs that the model reads, with the arrays named besides."""
        visual = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "second_per_grid_ts")
        wanted = ("input_ids", "attention_mask", *visual, *names)
        return {name: self.arrays[name] for name in wanted if name in self.arrays}

    def prepare(self) -> list[PreparedPrompt]:
        """Each conversation through our processor, media read from the case's files."""
        media = self._media()
        prompts = []
        for messages in self.conversations:
            parts = [p for m in messages if not isinstance(m["content"], str) for p in m["content"]]
            shown = [next(media) for p in parts if {"image", "image_url", "video"} & p.keys()]
            images = [item for item in shown if isinstance(item, Image)]
            videos = [item for item in shown if isinstance(item, Video)]
            prompts.append(self.processor.prepare(messages, images, videos))
        return prompts

    @property
    def _video_kwargs(self) -> dict[str, Any]:
        utils = self.facts.get("utils_output") or {}
        return {**self.facts["processor_kwargs"], **(utils.get("video_kwargs") or {})}

    def _media(self) -> Iterator[Image | Video]:
        """All images and videos in prompt order, resized first where the case went through the official utilities."""
        utils = self.facts.get("utils_output") or {}
        image_sizes = iter(utils.get("image_sizes_wh", ()))
        video_shapes = iter(utils.get("video_shapes_tchw", ()))
        num_videos = 0
        for messages in self.conversations:
            for part in (p for m in messages if not isinstance(m["content"], str) for p in m["content"]):
                if reference := part.get("image") or part.get("image_url"):
                    picture = PIL.Image.open(self.variant / reference)
                    yield Image(resize(picture.convert("RGB"), *next(image_sizes)) if utils else picture)
                elif reference := part.get("video"):
                    frames = self._frames(reference)
                    if utils:
                        frames = _as_the_utilities_left_them(frames, next(video_shapes))
                    yield Video(frames, **self._video_fields(num_videos))
                    num_videos += 1

    def _frames(self, reference: str | list[str]) -> np.ndarray:
        if isinstance(reference, list):
            return np.stack([np.asarray(PIL.Image.open(self.variant / name).convert("RGB")) for name in reference])
        with np.load(self.variant / reference) as file:
            return file["frames"]

    def _video_fields(self, index: int) -> dict[str, Any]:
        """The processor's keyword arguments, one list element a video, as the fields of our `Video`."""
        kwargs = {
            name: value[index] if isinstance(value, list) else value
            for name, value in self._video_kwargs.items()
            if value is not None
        }
        fields = {name: kwargs[name] for name in ("fps", "timestamps", "frame_types") if kwargs.get(name) is not None}
        for field, height, width in (("size", "height", "width"), ("fast_size", "fast_height", "fast_width")):
            if kwargs.get(height) is not None:
                fields[field] = (kwargs[height], kwargs[width])
        unknown = kwargs.keys() - {"fps", "timestamps", "frame_types", "height", "width", "fast_height", "fast_width"}
        assert not unknown, f"{self.name}: this test does not know the processor arguments {sorted(unknown)}"
        return fields


def _as_the_utilities_left_them(frames: np.ndarray, shape_tchw: list[int]) -> np.ndarray:
    count, _, height, width = shape_tchw
    if count <= len(frames):
        chosen = np.linspace(0, len(frames) - 1, count).round().astype(int)
    else:  # Preview's utilities repeat the last frame to an even number
        chosen = np.minimum(np.arange(count), len(frames) - 1)
    return np.stack([np.asarray(resize(PIL.Image.fromarray(frames[i]), width, height)) for i in chosen])


def golden_variants() -> list[Path]:
    """The folders with an index.json in `KEYE_GOLDEN_DIR`, or that folder itself."""
    root = Path(os.environ.get("KEYE_GOLDEN_DIR", GOLDEN))
    if (root / "index.json").is_file():
        return [root]
    variants = sorted(index.parent for index in root.glob("*/index.json"))
    assert variants, f"KEYE_GOLDEN_DIR {root} holds no index.json, neither itself nor in a folder of it"
    return variants


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_case" in metafunc.fixturenames:
        cases = [
            GoldenCase(variant, entry["name"])
            for variant in golden_variants()
            for entry in json.loads((variant / "index.json").read_text(encoding="utf-8"))["cases"]
        ]
        metafunc.parametrize("golden_case", cases, ids=lambda case: f"{case.variant.name}-{case.name}")
    if "golden_checkpoint" in metafunc.fixturenames:
        checkpoints = [variant / "checkpoint" for variant in golden_variants()]
        metafunc.parametrize("golden_checkpoint", checkpoints, ids=lambda path: path.parent.name)


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
