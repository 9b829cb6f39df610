"""A Keye with random weights at the real sizes, made on the device, and prompts of noise for it. No files, no words."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from keye.worker.engine.step_plan import StepLimits
from keye.worker.model.configuration_keye import KeyeConfig, KeyeVisionConfig
from keye.worker.model.image_processing import ImageProcessor
from keye.worker.model.keye import KeyeForConditionalGeneration
from keye.worker.model.positions import Grid, position_ids
from keye.worker.model.processor import KeyeProcessor, PreparedPrompt

NUM_TEXT_TOKENS = 32


@dataclass(frozen=True)
class Size:
    """What is run: the model, the sides of an image in patches, and how much of everything."""

    config: KeyeConfig
    dtype: torch.dtype
    grid: tuple[int, int]
    new_tokens: int
    num_running: tuple[int, ...]
    limits: StepLimits
    side_of_matrices: int
    copied_bytes: int


def real_size() -> Size:
    return Size(
        config=KeyeConfig(),
        dtype=torch.bfloat16,
        grid=(80, 64),  # 1,280 visual tokens
        new_tokens=128,
        num_running=(8, 32, 64),
        limits=StepLimits(max_running=64, max_step_tokens=8192),
        side_of_matrices=8192,
        copied_bytes=4 * 2**30,
    )


def tiny_size() -> Size:
    config = KeyeConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        rope_parameters={"mrope_section": [4, 6, 6]},
        max_position_embeddings=1024,
        image_token_id=500,
        video_token_id=501,
        bos_token_id=502,
        eos_token_id=503,
        vision_config=KeyeVisionConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, image_size=56
        ),
    )
    return Size(
        config=config,
        dtype=torch.float32,
        grid=(8, 8),
        new_tokens=8,
        num_running=(2, 4),
        limits=StepLimits(max_running=4, max_step_tokens=256),
        side_of_matrices=256,
        copied_bytes=2**22,
    )


def make_model(size: Size, device: torch.device) -> KeyeForConditionalGeneration:
    """Random weights, made on the device in their own precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(size.dtype)
    try:
        with torch.device(device):
            model = KeyeForConditionalGeneration(size.config)
    finally:
        torch.set_default_dtype(before)
    model.visual.vision_model.embeddings.normalise = _image_processor(size).normalise
    model.train(False)
    return model


class _Wordless:
    """Stands for a prompt format and its tokenizer where nobody reads the text."""

    all_special_ids = ()

    @property
    def tokenizer(self) -> "_Wordless":
        return self

    def __len__(self) -> int:
        return 0

    def convert_ids_to_tokens(self, ids: Any) -> list[str]:
        return []

    def encode(self, text: str, **_: Any) -> list[int]:
        return []


def make_processor(size: Size) -> KeyeProcessor:
    """Says how large images are; knows no end token, so that every answer has the same length."""
    wordless: Any = _Wordless()
    return KeyeProcessor(size.config, wordless, _image_processor(size), eos_token_ids=())


def _image_processor(size: Size) -> ImageProcessor:
    pixels = 14 * 14 * size.grid[0] * size.grid[1]
    half = (0.5, 0.5, 0.5)
    return ImageProcessor(
        min_pixels=28 * 28, max_pixels=pixels, patch_size=14, merge_size=2, image_mean=half, image_std=half
    )


def make_prompt(size: Size, seed: int) -> PreparedPrompt:
    """One image of noise between random words."""
    generator = torch.Generator().manual_seed(seed)
    config, (rows, columns) = size.config, size.grid
    words = torch.randint(0, 400, (NUM_TEXT_TOKENS,), generator=generator)
    image = torch.full((rows * columns // 4,), config.image_token_id)
    return _prompt(
        config,
        words,
        image,
        image_grids=[(1, rows, columns)],
        pixel_values=torch.randint(0, 256, (rows * columns, 3, 14, 14), generator=generator, dtype=torch.uint8),
        image_grid_thw=torch.tensor([[1, rows, columns]]),
    )


def make_video_prompt(size: Size, num_tokens: int) -> PreparedPrompt:
    """One video of noise that takes about so many visual tokens, of frames a quarter as large as images."""
    config, rows, columns = size.config, size.grid[0] // 2, size.grid[1] // 2
    tokens_a_frame = rows * columns // 4
    frames = max(1, num_tokens // tokens_a_frame)
    return _prompt(
        config,
        torch.arange(NUM_TEXT_TOKENS),
        torch.full((frames * tokens_a_frame,), config.video_token_id),
        video_grids=[(frames, rows, columns)],
        pixel_values_videos=torch.randint(0, 256, (frames * rows * columns, 3, 14, 14), dtype=torch.uint8),
        video_grid_thw=torch.tensor([[frames, rows, columns]]),
    )


def make_words(size: Size, seed: int, num_tokens: int) -> PreparedPrompt:
    """Random words without an image."""
    words = torch.randint(0, 400, (num_tokens,), generator=torch.Generator().manual_seed(seed))
    return _prompt(size.config, words, words[:0])


def _prompt(
    config: KeyeConfig,
    words: Tensor,
    placeholders: Tensor,
    *,
    image_grids: Sequence[Grid] = (),
    video_grids: Sequence[Grid] = (),
    **media: Tensor,
) -> PreparedPrompt:
    """Placeholders between words, and what they stand for as `PreparedPrompt` has it."""
    input_ids = torch.cat([words[:8], placeholders, words[8:]])
    positions, delta = position_ids(input_ids, config, image_grids, video_grids)
    return PreparedPrompt(
        text="",
        input_ids=input_ids,
        position_ids=positions,
        rope_delta=delta,
        num_visual_tokens=len(placeholders),
        **media,
    )
