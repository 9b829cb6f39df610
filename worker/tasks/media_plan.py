"""What a job's media would become, told without a model: frames, sizes, tokens, memory. Decodes a frame a video."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from keye.config.formats import format_of_file
from keye.config.job import ImagePart, VideoPart
from keye.worker.media.decode.image import decode_image
from keye.worker.media.decoded import Size
from keye.worker.media.frames.clip import examine_clip
from keye.worker.media.frames.video_plan import plan_video, tell_thinning
from keye.worker.model.frame_budget import MARK_TOKENS, fit_slow_fast, fit_slow_fast_video, fit_video
from keye.worker.model.image_processing import ImageProcessor
from keye.worker.model.visual_budget import VisualBudget, fit_image, share_context

# Limits of who looks at files of their own.
_MAX_PIXELS = 10**9
_MAX_BYTES = 2**36


@dataclass(frozen=True, slots=True)
class CheckpointFacts:
    """What sizes depend on; `cache_bytes` are those that a token takes in the engine's cache at 16 bits a number."""

    images: ImageProcessor
    splits_video_into_frames: bool
    context: int
    cache_bytes: int

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises `OSError`, `KeyError` or `ValueError` for a folder that is no checkpoint."""
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        return cls(
            images=ImageProcessor.from_checkpoint(path),
            splits_video_into_frames=config["model_type"] == "KeyeVL1_5",
            context=config["max_position_embeddings"],
            cache_bytes=2 * 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"],
        )


@dataclass(frozen=True, slots=True)
class PlannedMedium:
    """Sizes are (height, width). `visual_tokens` of a 1.5 video are the most that a split of its frames comes to."""

    name: str
    type: str
    original_size: Size
    size: Size
    visual_tokens: int
    frames_asked: int = 1
    frames: int = 1
    fps: float | None = None
    duration_seconds: float | None = None
    reasons: tuple[str, ...] = ()
    warning: str | None = None

    @property
    def pixel_bytes(self) -> int:
        return 3 * self.frames * self.size[0] * self.size[1]


def part_of(path: Path, **asked: object) -> ImagePart | VideoPart:
    """A part for the file, by its first bytes; `asked` are fields of `VideoPart`, of which an image takes its own."""
    with path.open("rb") as file:
        file_format = format_of_file(file)
    kind = VideoPart if file_format.media_type == "video" else ImagePart
    fields = {name: value for name, value in asked.items() if value is not None and name in kind.model_fields}
    return kind.model_validate({"uri": str(path.absolute()), **fields})


def plan_media(
    parts: Sequence[ImagePart | VideoPart], facts: CheckpointFacts, num_tokens: int, min_frames_per_second: float
) -> list[PlannedMedium]:
    """`parts` name files of this machine; `num_tokens` is what text and answer leave of the context.

    Videos read at less than `min_frames_per_second` have a warning. Raises `Fault` for what cannot be decoded or
    shown.
    """
    budget = share_context(facts.images, parts, num_tokens)
    return [
        _plan_video(part, facts, budget, min_frames_per_second)
        if isinstance(part, VideoPart)
        else _plan_image(part, facts, budget)
        for part in parts
    ]


def _plan_image(part: ImagePart, facts: CheckpointFacts, budget: VisualBudget) -> PlannedMedium:
    with open(part.uri, "rb") as file:
        original_size = decode_image(file, part.uri, _MAX_PIXELS, _MAX_BYTES).original_size
    size = fit_image(facts.images, budget.image_tokens, part, *original_size)
    return PlannedMedium(part.uri, "image", original_size, size, _tokens(facts, size))


def _plan_video(
    part: VideoPart, facts: CheckpointFacts, budget: VisualBudget, min_frames_per_second: float
) -> PlannedMedium:
    images, max_tokens = facts.images, budget.video_tokens
    fit = fit_slow_fast_video if facts.splits_video_into_frames else fit_video
    with open(part.uri, "rb") as file:
        clip = examine_clip(file, part.uri, _MAX_PIXELS)
    original_size = clip.upright_size
    plan = plan_video(
        clip.index, part, lambda _part, *frames: fit(images, max_tokens, part, *frames), original_size, part.uri
    )
    num_frames = len(plan.wanted)
    num_tokens = num_frames * _tokens(facts, plan.size)
    if facts.splits_video_into_frames:
        splits = [(num_slow, num_frames - num_slow) for num_slow in range(1, num_frames + 1)]
        num_tokens = max(
            sum(num * _tokens(facts, size) for num, size in zip(split, sizes, strict=True)) + MARK_TOKENS * num_frames
            for split in splits
            for sizes in [fit_slow_fast(images, part, *split, *original_size, max_tokens)]
        )
    return PlannedMedium(
        part.uri,
        "video",
        original_size,
        plan.size,
        num_tokens,
        plan.frames_asked,
        num_frames,
        plan.fps,
        clip.index.duration_seconds,
        plan.reasons,
        tell_thinning(plan, min_frames_per_second),
    )


def _tokens(facts: CheckpointFacts, size: Size) -> int:
    return size[0] * size[1] // facts.images.factor**2
