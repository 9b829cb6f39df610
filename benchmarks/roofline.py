"""What a device could do at best: its measured ceilings, and the least time they allow for each stage of a job."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.synthetic_keye import NUM_TEXT_TOKENS, Size
from keye.worker.daemon.bench import wait_for
from keye.worker.engine.memory import block_bytes
from keye.worker.model.keye import KeyeForConditionalGeneration


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches: bytes a second read and written by a copy, operations a second of a matrix product."""

    bytes_per_second: float
    operations_per_second: float


@dataclass(frozen=True)
class Floors:
    """The least seconds that the device could take: for arithmetic, or for reading weights and cache once."""

    encode: float
    prefill: float
    decode_alone: float
    decode_full: float

    @classmethod
    def of(cls, ceilings: Ceilings, size: Size, model: KeyeForConditionalGeneration) -> "Floors":
        config, vision = size.config, size.config.vision_config
        num_patches = size.grid[0] * size.grid[1]
        num_tokens = num_patches // 4 + NUM_TEXT_TOKENS
        layer_weights, head_weights = _num_weights(model.model.layers), _num_weights(model.lm_head)
        encode = 2 * num_patches * _num_weights(model.visual.vision_model.encoder)
        encode += 4 * num_patches**2 * vision.hidden_size * vision.num_hidden_layers
        encode += 2 * num_patches // 4 * _num_weights(model.mlp_AR)
        heads_width = config.num_attention_heads * config.head_dim
        prefill = 2 * num_tokens * layer_weights + 2 * head_weights
        prefill += 2 * num_tokens**2 * heads_width * config.num_hidden_layers  # half of the square: causal
        weights = (layer_weights + head_weights) * size.dtype.itemsize
        half_written = num_tokens + size.new_tokens // 2
        cache = block_bytes(config, half_written, size.dtype)
        return cls(
            encode / ceilings.operations_per_second,
            prefill / ceilings.operations_per_second,
            (weights + cache) / ceilings.bytes_per_second,
            (weights + size.limits.max_running * cache) / ceilings.bytes_per_second,
        )

    def images_per_second(self, size: Size) -> float:
        """The roofline of the engine with all its places taken."""
        decoding = size.new_tokens * self.decode_full / size.limits.max_running
        return 1 / (self.encode + self.prefill + decoding)


def _num_weights(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def measure_ceilings(size: Size, device: torch.device) -> Ceilings:
    source = torch.randint(0, 100, (size.copied_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copying = _median_seconds(lambda: target.copy_(source), device)
    side = size.side_of_matrices
    a, b = (torch.randn(side, side, dtype=size.dtype, device=device) for _ in range(2))
    multiplying = _median_seconds(lambda: a @ b, device)
    return Ceilings(2 * size.copied_bytes / copying, 2 * side**3 / multiplying)


def _median_seconds(run: Callable[[], Any], device: torch.device, rounds: int = 7) -> float:
    seconds = []
    for _ in range(rounds):
        wait_for(device)
        began = time.perf_counter()
        for _ in range(10):
            run()
        wait_for(device)
        seconds.append((time.perf_counter() - began) / 10)
    return sorted(seconds)[rounds // 2]
