"""What the released reference was given and what it answered, as the files beside this one hold it.

A generation is a folder with a checkpoint of random weights in the official layout, media, and cases.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from keye.worker.model.image_processing import Image, Video
from keye.worker.model.processor import KeyeProcessor, PreparedPrompt

GENERATIONS = {"Keye": Path(__file__).parent / "preview", "KeyeVL1_5": Path(__file__).parent / "v1_5"}
"""The folders that ship, by `model_type`."""


@dataclass(frozen=True)
class GoldenCase:
    generation: Path
    name: str

    @classmethod
    def of(cls, generation: Path) -> list["GoldenCase"]:
        return [cls(generation, file.stem) for file in sorted(generation.glob("cases/*.json"))]

    def __str__(self) -> str:
        return f"{self.generation.name}/{self.name}"

    @cached_property
    def facts(self) -> dict[str, Any]:
        return json.loads((self.generation / "cases" / f"{self.name}.json").read_text(encoding="utf-8"))

    @cached_property
    def arrays(self) -> dict[str, Tensor]:
        """Every array, in and out, by its name in tests/golden/README.md."""
        with np.load(self.generation / "cases" / f"{self.name}.npz") as file:
            return {name: torch.from_numpy(file[name]) for name in file.files}

    @property
    def conversations(self) -> list[list[dict[str, Any]]]:
        return self.facts["messages"] if self.facts["batch"] else [self.facts["messages"]]

    def prepare(self, processor: KeyeProcessor) -> list[PreparedPrompt]:
        """Each conversation through a processor, media read from the case's files."""
        media = self._media()
        prompts = []
        for messages in self.conversations:
            shown = [next(media) for _ in _media_parts(messages)]
            images = [item for item in shown if isinstance(item, Image)]
            videos = [item for item in shown if isinstance(item, Video)]
            prompts.append(processor.prepare(messages, images, videos))
        return prompts

    @property
    def has_exact_frame_sizes(self) -> bool:
        """Frames resized on a tensor to sizes the caller chose, not by Pillow."""
        return "height" in self._video_kwargs

    @property
    def _video_kwargs(self) -> dict[str, Any]:
        """The processor's keyword arguments, those of videos with one list element each."""
        return self.facts["processor_kwargs"]

    def _media(self) -> Iterator[Image | Video]:
        """All images and videos in prompt order."""
        num_videos = 0
        for part in (part for messages in self.conversations for part in _media_parts(messages)):
            if "video" in part:
                yield Video(self._frames(part["video"]), **self._video_fields(num_videos))
                num_videos += 1
            else:
                yield Image(self._picture(part.get("image") or part["image_url"]))

    def _picture(self, reference: str) -> PIL.Image.Image:
        with PIL.Image.open(self.generation / reference) as picture:
            picture.load()
        return picture

    def _frames(self, reference: str | list[str]) -> np.ndarray:
        if isinstance(reference, list):
            return np.stack([np.asarray(self._picture(name).convert("RGB")) for name in reference])
        with np.load(self.generation / reference) as file:
            return file["frames"]

    def _video_fields(self, index: int) -> dict[str, Any]:
        """The keyword arguments of one video as the fields of our `Video`."""
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
        assert not unknown, f"{self}: no field of ours stands for the processor arguments {sorted(unknown)}"
        return fields


def _media_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
    return [part for part in parts if {"image", "image_url", "video"} & part.keys()]
