"""A conversation with its images and videos to the tensors a model or an engine takes. Fetches and decodes nothing."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from secrets import token_bytes
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, Qwen2Tokenizer

from keye.config.codes import ErrorCode
from keye.config.faults import Fault
from keye.worker.model.checkpoint import IMAGE_PAD
from keye.worker.model.checkpoint_files import read_generation
from keye.worker.model.configuration_keye import KeyeConfig
from keye.worker.model.image_processing import Image, ImageProcessor, Patches, Video, frame_types
from keye.worker.model.positions import position_ids
from keye.worker.model.prompt import (
    VIDEO_PAD,
    Message,
    PromptFormat,
    Thinking,
    fill_placeholders,
    readable,
    slow_fast_filler,
)
from keye.worker.sizing import Sizing


@dataclass(frozen=True, eq=False, kw_only=True)
class PreparedMedia:
    """The images and videos of one conversation, or of several that are about the same."""

    image_fillers: Sequence[str] = ()
    """What stands in the text for each"""
    video_fillers: Sequence[str] = ()
    pixel_values: Tensor | None = None
    """uint8 [patches, 3, p, p] of all images, in prompt order; the model normalises them"""
    image_grid_thw: Tensor | None = None
    """int64 [images, 3]: 1, rows, columns in patches"""
    pixel_values_videos: Tensor | None = None
    """The same of all videos"""
    video_grid_thw: Tensor | None = None
    """int64 [rows, 3]: frames, rows, columns. Preview: a row a video. 1.5: a row a run of frames of one size"""
    second_per_grid_ts: Tensor | None = None
    """float32 [videos], Preview only"""
    num_frames: Tensor | None = None
    """int64 [videos]"""
    image_digests: Sequence[bytes] = ()
    """As `digest_items` has them; none where they are still to be made"""
    video_digests: Sequence[bytes] = ()
    """The same of all videos, or frames where each is an item"""
    salt: bytes = b""
    """What is of different salt shares nothing in an engine's caches, whatever it holds"""


@dataclass(frozen=True, eq=False)
class PreparedPrompt(PreparedMedia):
    """One conversation, ready to run. Nothing is padded and nothing refers to another conversation."""

    text: str
    """After the chat template and with all placeholders in."""
    input_ids: Tensor
    """int64 [L]"""
    position_ids: Tensor
    """int64 [3, L]: temporal, height, width"""
    rope_delta: int
    """The token generated in column n stands at n + rope_delta in all three rows."""
    num_visual_tokens: int


@dataclass(eq=False)
class KeyeProcessor:
    config: KeyeConfig
    prompt_format: PromptFormat
    image_processor: ImageProcessor
    eos_token_ids: Sequence[int]
    """A generation ends at any of these."""
    shares_prefixes: bool = True
    """Whether conversations about different `PreparedMedia` may share what an engine has computed."""

    @classmethod
    def from_checkpoint(cls, path: Path | str) -> "KeyeProcessor":
        config = AutoConfig.from_pretrained(path)
        eos = read_generation(Path(path)).get("eos_token_id", config.eos_token_id)
        return cls(
            config,
            PromptFormat.from_checkpoint(path),
            ImageProcessor.from_checkpoint(path),
            eos if isinstance(eos, list) else [eos],
        )

    @property
    def sizing(self) -> Sizing:
        """How large this model is shown media, before a job's context is shared among them."""
        return self.image_processor.sizing(self.config.splits_video_into_frames)

    @property
    def tokenizer(self) -> Qwen2Tokenizer:
        return self.prompt_format.tokenizer

    def prepare(
        self,
        messages: Sequence[Message],
        images: Sequence[Image] = (),
        videos: Sequence[Video] = (),
        thinking: Thinking = "auto",
    ) -> PreparedPrompt:
        """Tensors of one conversation; images and videos are given in the order the messages name them.

        Raises `PlaceholderMismatch` when messages and media differ in number, `Fault` for pixels that cannot be
        shown.
        """
        return self.prepare_text(messages, self.prepare_media(images, videos), thinking)

    def prepare_media(self, images: Sequence[Image], videos: Sequence[Video]) -> PreparedMedia:
        """The half of `prepare` that conversations about the same media share: the patches are in memory once."""
        image_patches = [self.image_processor.process_image(image) for image in images]
        video_patches, video_fillers = self._videos(videos)
        seconds = None if self.config.splits_video_into_frames else [1 / video.fps for video in videos]
        return PreparedMedia(
            image_fillers=[IMAGE_PAD * sum(self._frame_tokens(patches)) for patches in image_patches],
            video_fillers=video_fillers,
            pixel_values=_joined(image_patches),
            image_grid_thw=torch.tensor([grid for patches in image_patches for grid in patches.grids])
            if images
            else None,
            pixel_values_videos=_joined(video_patches),
            video_grid_thw=torch.tensor([grid for patches in video_patches for grid in patches.grids])
            if videos
            else None,
            second_per_grid_ts=torch.tensor(seconds, dtype=torch.float32) if seconds else None,
            num_frames=torch.tensor([len(video.frames) for video in videos]) if videos else None,
            image_digests=self._digests(image_patches),
            video_digests=self._digests(video_patches),
            salt=b"" if self.shares_prefixes else token_bytes(16),
        )

    def prepare_text(
        self, messages: Sequence[Message], media: PreparedMedia, thinking: Thinking = "auto"
    ) -> PreparedPrompt:
        """The other half: one conversation about them. Raises `PlaceholderMismatch` as `prepare` does."""
        config = self.config
        text = fill_placeholders(
            self.prompt_format.render(messages, thinking), images=media.image_fillers, videos=media.video_fillers
        )
        input_ids = torch.tensor(self.prompt_format.encode(text))
        image_grids, video_grids = (
            [] if grids is None else grids.tolist() for grids in (media.image_grid_thw, media.video_grid_thw)
        )
        seconds = None if media.second_per_grid_ts is None else media.second_per_grid_ts.tolist()
        positions, delta = position_ids(input_ids, config, image_grids, video_grids, seconds)
        visual = (input_ids == config.image_token_id) | (input_ids == config.video_token_id)
        return PreparedPrompt(
            text=readable(text),
            input_ids=input_ids,
            position_ids=positions,
            rope_delta=delta,
            num_visual_tokens=int(visual.sum()),
            **vars(media),
        )

    def count_text_tokens(self, messages: Sequence[Message], thinking: Thinking = "auto") -> int:
        """Tokens of the conversation without its media, each of which counts as one."""
        return len(self.prompt_format.encode(self.prompt_format.render(messages, thinking)))

    @property
    def template_tokens(self) -> int:
        """Least that a conversation has beside its texts and media."""
        # Both: a template may write a system message of its own.
        system, user = ({"role": role, "content": ""} for role in ("system", "user"))
        return min(self.count_text_tokens([user]), self.count_text_tokens([system, user]))

    def _videos(self, videos: Sequence[Video]) -> tuple[list[Patches], list[str]]:
        """Patches of each video and the text that stands for it."""
        if not self.config.splits_video_into_frames:
            whole = [self.image_processor.process_video(video) for video in videos]
            return whole, [VIDEO_PAD * sum(self._frame_tokens(patches)) for patches in whole]
        split = [self.image_processor.process_slow_fast_video(video) for video in videos]
        return split, [
            slow_fast_filler(self._frame_tokens(patches), frame_types(video), _timestamps(video))
            for patches, video in zip(split, videos, strict=True)
        ]

    def _digests(self, media: Iterable[Patches]) -> list[bytes]:
        splits = self.config.splits_video_into_frames
        return [
            digest
            for patches in media
            for digest in digest_items(
                patches.values,
                [(1, h, w) for t, h, w in patches.grids for _ in range(t)] if splits else patches.grids,
            )
        ]

    def _frame_tokens(self, patches: Patches) -> list[int]:
        return [h * w // self.image_processor.merge_size**2 for t, h, w in patches.grids for _ in range(t)]

    def pad_left(self, prompts: Sequence[PreparedPrompt]) -> dict[str, Any]:
        """The keyword arguments of `model.generate` for a batch: padded in front, so that all rows end together."""
        length = max(len(prompt.input_ids) for prompt in prompts)
        batch: dict[str, Any] = {
            "input_ids": torch.full((len(prompts), length), self.tokenizer.pad_token_id),
            "attention_mask": torch.zeros(len(prompts), length, dtype=torch.long),
            "position_ids": torch.ones(3, len(prompts), length, dtype=torch.long),
        }
        for row, prompt in enumerate(prompts):
            start = length - len(prompt.input_ids)
            batch["input_ids"][row, start:] = prompt.input_ids
            batch["attention_mask"][row, start:] = 1
            batch["position_ids"][:, row, start:] = prompt.position_ids
        for name in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
            parts = [part for prompt in prompts if (part := getattr(prompt, name)) is not None]
            if parts:
                batch[name] = torch.cat(parts)
        return batch


def digest_items(patches: np.ndarray, grids: Iterable[Sequence[int]]) -> list[bytes]:
    """Of each item, of patches [p, ...] and a grid (t, h, w), what its rows follow from."""
    digests, start = [], 0
    for t, h, w in grids:
        stop = start + t * h * w
        digest = blake2b(f"{t} {h} {w} ".encode(), digest_size=32)
        digest.update(np.ascontiguousarray(patches[start:stop]).data.cast("B"))
        digests.append(digest.digest())
        start = stop
    return digests


def _joined(parts: list[Patches]) -> Tensor | None:
    values = [part.values for part in parts]
    if len(values) <= 1:  # a video alone may be 100 MB: not copied
        return torch.from_numpy(values[0]) if values else None
    return torch.from_numpy(np.concatenate(values))


def _timestamps(video: Video) -> list[float] | None:
    if video.timestamps is None:
        return None
    if len(video.timestamps) != len(video.frames):
        raise Fault(
            ErrorCode.MEDIA_UNSUPPORTED, f"{len(video.timestamps)} timestamps came with {len(video.frames)} frames"
        )
    # In float32, as the model was trained: 0.25 and 0.35 round differently there.
    return np.asarray(video.timestamps, dtype=np.float32).tolist()
