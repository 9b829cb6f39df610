"""The memory of the paged key-value cache: what a GPU has left over once the largest step has been tried on it.

Who owns a block is not known here.
"""

import logging

import torch

from keye.worker.engine.step_plan import StepLimits
from keye.worker.model.configuration_keye import KeyeConfig
from keye.worker.model.keye import KeyeForConditionalGeneration
from keye.worker.model.padded_attention import PaddedAttention
from keye.worker.model.processor import KeyeProcessor

logger = logging.getLogger(__name__)

# Pages that are never written cost nothing, so this is a limit and no reservation.
_CPU_CACHE_BYTES = 2 * 2**30


def block_bytes(config: KeyeConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values that one block takes in all layers together."""
    return 2 * config.num_hidden_layers * block_size * config.num_key_value_heads * config.head_dim * dtype.itemsize


class KVCache:
    """For each layer, keys and values [num_blocks + 1, block_size, kv_heads, head_dim].

    The block behind the others is nobody's: rows that only fill a batch up write and read there.
    """

    def __init__(
        self, config: KeyeConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.scratch_block = num_blocks
        self.block_size = block_size
        shape = (num_blocks + 1, block_size, config.num_key_value_heads, config.head_dim)
        # Zeros, not whatever lay there: a masked slot is multiplied by 0, and 0 times NaN is NaN.
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]

    def wipe(self, blocks: list[int]) -> None:
        """Take out numbers that are not finite before another sequence gets the blocks."""
        for layer in (*self.keys, *self.values):
            layer[torch.tensor(blocks, device=layer.device)] = 0


def measure_cache_bytes(
    model: KeyeForConditionalGeneration, processor: KeyeProcessor, limits: StepLimits, memory_fraction: float
) -> int:
    """Bytes for keys and values so that weights, cache and the largest step take `memory_fraction` of the GPU.

    Memory of other processes counts as taken. To be asked once, before an engine works.
    """
    device = model.device
    if device.type == "cpu":
        return _CPU_CACHE_BYTES
    torch.cuda.reset_peak_memory_stats(device)
    at_rest = torch.cuda.memory_allocated(device)
    run_largest_step(model, processor, limits)
    at_work = torch.cuda.max_memory_allocated(device) - at_rest
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    for_cache = int(memory_fraction * total) - (total - free) - at_work
    logger.info(
        "GPU memory: %.1f of %.1f GiB taken, %.1f GiB for the largest step, %.1f GiB for keys and values",
        *(num_bytes / 2**30 for num_bytes in (total - free, total, at_work, for_cache)),
    )
    return for_cache


@torch.inference_mode()
def run_largest_step(model: KeyeForConditionalGeneration, processor: KeyeProcessor, limits: StepLimits) -> None:
    """What takes most memory besides the cache: images that fill a step's tokens, those tokens, and their logits."""
    images = processor.image_processor
    side = int(images.max_pixels**0.5) // images.factor * (images.factor // images.patch_size)
    num_images = 1 + limits.max_step_tokens * images.merge_size**2 // side**2
    patch = (model.config.vision_config.num_channels, images.patch_size, images.patch_size)
    model.get_image_features(
        torch.zeros(num_images * side**2, *patch, device=model.device), [[1, side, side]] * num_images
    )
    tokens = torch.zeros(1, limits.max_step_tokens, dtype=torch.long, device=model.device)
    positions = torch.arange(limits.max_step_tokens, device=model.device).expand(3, 1, -1)
    embeds = model.model.embed_tokens(tokens)
    hidden = model.model(embeds, positions, PaddedAttention(model.model, embeds))[0]
    model.lm_head(hidden[: limits.max_running]).float().sort()
