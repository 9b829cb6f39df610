"""What memory allows: a cache of what a GPU has left over once the largest step has been tried, and how large a step
may be, as memory that ran out has taught.
"""

import logging

import torch

from keye.worker.engine.step_plan import StepLimits
from keye.worker.model.configuration_keye import KeyeConfig
from keye.worker.model.keye import KeyeForConditionalGeneration
from keye.worker.model.padded_attention import attend_padded
from keye.worker.model.processor import KeyeProcessor

logger = logging.getLogger(__name__)

# Pages that are never written cost nothing, so this is a limit and no reservation.
_CPU_CACHE_BYTES = 2 * 2**30

FIRST_REST = 1000


def block_bytes(config: KeyeConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values that one block takes in all layers together."""
    return 2 * config.num_hidden_layers * block_size * config.num_key_value_heads * config.head_dim * dtype.itemsize


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
    hidden = model.model(embeds, positions, attend_padded(model.model, embeds))[0]
    model.lm_head(hidden[: limits.max_running]).float().sort()


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
