"""What memory allows: a cache of what a GPU has left over once the largest step has been tried, and how large a step
may be, as memory that ran out has taught.
"""

import logging
from collections.abc import Callable
from collections.abc import Sequence as Seq
from functools import partial
from math import prod

import torch

from keye.worker.engine.step_plan import StepLimits
from keye.worker.model.configuration_keye import KeyeConfig
from keye.worker.model.keye import KeyeForConditionalGeneration
from keye.worker.model.padded_attention import attend_padded
from keye.worker.model.processor import KeyeProcessor
from keye.worker.model.vision_tower import MAX_PATCHES

logger = logging.getLogger(__name__)

# Pages that are never written cost nothing (`KVCache`), so this is a limit and no reservation. In time it is filled:
# what was read for one job is kept for the next.
CPU_CACHE_BYTES = 2 * 2**30

# Of what the tower made of media: some thirty thousand rows of an 8B model, and little where the cache is small.
MAX_ROW_BYTES = 2**28
ROW_SHARE = 16

FIRST_REST = 1000

# From here on a video takes the more memory the longer it is, in proportion.
LONG_VIDEO_PATCHES = 2 * MAX_PATCHES


def block_bytes(config: KeyeConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values that one block takes in all layers together."""
    return 2 * config.num_hidden_layers * block_size * config.num_key_value_heads * config.head_dim * dtype.itemsize


def measure_cache_bytes(
    model: KeyeForConditionalGeneration, processor: KeyeProcessor, limits: StepLimits, memory_fraction: float
) -> int:
    """Bytes for keys and values so that weights, cache and the largest step take `memory_fraction` of the GPU.

    Memory of other processes counts as taken. To be asked once, before an engine works.
    """
    device, config = model.device, model.config
    if device.type == "cpu":
        return CPU_CACHE_BYTES
    step_bytes, video_token_bytes = largest_needs(model, processor, limits, partial(_peak_bytes, device))
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    room = int(memory_fraction * total) - (total - free)
    token_bytes = block_bytes(config, 1, model.dtype)
    for_cache = cache_bytes_within(room, step_bytes, token_bytes, video_token_bytes, config.max_position_embeddings)
    logger.info(
        "GPU memory: %.1f of %.1f GiB taken, %.1f GiB for the largest step or video, %.1f GiB for keys and values",
        *(num_bytes / 2**30 for num_bytes in (total - free, total, room - for_cache, for_cache)),
    )
    return for_cache


def largest_needs(
    model: KeyeForConditionalGeneration,
    processor: KeyeProcessor,
    limits: StepLimits,
    peak_bytes: Callable[[Callable[[], None]], int],
) -> tuple[int, float]:
    """Bytes that the largest step takes beside weights and cache, and that a token of a video takes in the tower.

    `peak_bytes` runs what it is given and tells what was taken meanwhile.
    """
    step_bytes = peak_bytes(partial(run_largest_step, model, processor, limits))
    if model.config.splits_video_into_frames:
        return step_bytes, 0.0
    video_bytes = peak_bytes(partial(run_long_video, model))
    return step_bytes, video_bytes / LONG_VIDEO_PATCHES * model.config.vision_config.spatial_merge_size**2


def count_blocks(cache_bytes: int, block_bytes: int, context: int, block_size: int, max_running: int) -> int:
    """How many blocks a cache has: what fits, and no more than running sequences of a whole `context` can fill."""
    return min(cache_bytes // block_bytes, max_running * -(-context // block_size))


def row_bytes(cache_bytes: int) -> int:
    """Bytes of encoded media that are kept beside a cache of so many bytes."""
    return min(MAX_ROW_BYTES, cache_bytes // ROW_SHARE)


def cache_bytes_within(room: int, step_bytes: int, token_bytes: int, video_token_bytes: float, max_tokens: int) -> int:
    """The largest cache that leaves room for the largest step and for the longest video whose tokens it could hold, and
    for encoded media that are kept (`row_bytes`).

    A token takes `token_bytes` in the cache, one of a video `video_token_bytes` in the tower; a sequence has at most
    `max_tokens`. Below zero where there is no room for a step.
    """
    beside_its_own_video = _beside_rows(room, 1 + video_token_bytes / token_bytes)
    beside_the_longest = _beside_rows(room - video_token_bytes * max_tokens)
    return int(min(_beside_rows(room - step_bytes), max(beside_its_own_video, beside_the_longest)))


def _beside_rows(room: float, bytes_each: float = 1) -> float:
    """How many bytes of cache `room` allows, each of which takes `bytes_each` of it and its part of `row_bytes`."""
    return max((room - MAX_ROW_BYTES) / bytes_each, room / (bytes_each + 1 / ROW_SHARE))


def _peak_bytes(device: torch.device, run: Callable[[], None]) -> int:
    torch.cuda.reset_peak_memory_stats(device)
    at_rest = torch.cuda.memory_allocated(device)
    run()
    return torch.cuda.max_memory_allocated(device) - at_rest


@torch.inference_mode()
def run_largest_step(model: KeyeForConditionalGeneration, processor: KeyeProcessor, limits: StepLimits) -> None:
    """What takes most memory besides the cache: images that fill a step's tokens, those tokens, and their logits."""
    images = processor.image_processor
    side = int(images.max_pixels**0.5) // images.factor * (images.factor // images.patch_size)
    num_images = 1 + limits.max_step_tokens * images.merge_size**2 // side**2
    num_images = min(num_images, max(1, MAX_PATCHES // side**2))
    patch = (model.config.vision_config.num_channels, images.patch_size, images.patch_size)
    model.get_image_features(
        torch.zeros(num_images * side**2, *patch, dtype=torch.uint8, device=model.device),
        [[1, side, side]] * num_images,
    )
    tokens = torch.zeros(1, limits.max_step_tokens, dtype=torch.long, device=model.device)
    positions = torch.arange(limits.max_step_tokens, device=model.device).expand(3, 1, -1)
    embeds = model.model.embed_tokens(tokens)
    hidden = model.model(embeds, positions, attend_padded(model.model, embeds))[0]
    model.lm_head(hidden[: limits.max_running]).float().sort()


@torch.inference_mode()
def run_long_video(model: KeyeForConditionalGeneration) -> None:
    """One item of `LONG_VIDEO_PATCHES`, by a tower of one layer: each takes the memory that the one before had."""
    vision, encoder = model.config.vision_config, model.visual.vision_model.encoder
    shape = (LONG_VIDEO_PATCHES, vision.num_channels, vision.patch_size, vision.patch_size)
    patches = torch.zeros(shape, dtype=torch.uint8)
    layers, encoder.layers = encoder.layers, encoder.layers[:1]
    try:
        model.get_video_features(patches, [[LONG_VIDEO_PATCHES // 32**2, 32, 32]])
    finally:
        encoder.layers = layers


def too_large(kind: str, grid: Seq[int], patch_size: int, most_patches: int) -> str:
    """What to tell whose image or video of this grid (t, h, w) found no room, though nothing else went in with it.

    `most_patches` have had room before; where this has no more, memory is short for another reason, and there is no
    number to give.
    """
    num_frames, height, width = grid
    pixels = height * width * patch_size**2
    asked = f"{num_frames} frames of" if num_frames > 1 else "a frame of" if kind == "video" else "an image of"
    known = ""
    if most_patches < prod(grid):
        if num_frames > 1 and most_patches >= height * width:
            known = f": max_frames {most_patches // (height * width)} or below fits, with max_pixels {pixels}"
        elif most_patches >= num_frames:
            known = f": max_pixels {most_patches // num_frames * patch_size**2} or below fits"
    return (
        f"There is no room in the device's memory for {asked} {width * patch_size} x {height * patch_size} pixels. "
        f"Lower max_pixels, max_frames or fps{known}."
    )


class MemoryLimits:
    """`now` starts at the configured limits, falls where memory runs out, and doubles after a rest without that.

    Memory may have been another process's for a while. The rest doubles with each fall, so that a device that really
    is too small is tried ever more rarely.
    """

    def __init__(self, configured: StepLimits) -> None:
        self.now = configured
        self._configured = configured
        self._rest = FIRST_REST
        self._num_calm_steps = 0

    def lower(self, max_step_tokens: int) -> None:
        """So many tokens are the most to try in a step from now on."""
        if max_step_tokens >= self.now.max_step_tokens:
            return
        if self._num_calm_steps:
            self._rest *= 2
            self._num_calm_steps = 0
        self._set(max_step_tokens)
        logger.warning("out of memory: at most %d tokens a step, twice that in %d steps", max_step_tokens, self._rest)

    def count_step(self) -> None:
        """Another step has ended."""
        if self.now == self._configured:
            return
        self._num_calm_steps += 1
        if self._num_calm_steps % self._rest == 0:
            self._set(min(2 * self.now.max_step_tokens, self._configured.max_step_tokens))

    def _set(self, max_step_tokens: int) -> None:
        self.now = StepLimits(min(max_step_tokens, self._configured.max_running), max_step_tokens)
