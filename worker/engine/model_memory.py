"""What a model takes of a GPU's memory, told without one and without weights: the trials of `memory.py` on tensors that
have shapes and no numbers.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForImageTextToText

from keye.config.codes import PrecisionSetting
from keye.worker.engine.memory import block_bytes, cache_bytes_within, count_blocks, largest_needs, row_bytes
from keye.worker.engine.step_plan import StepLimits
from keye.worker.model.attention_choice import paged_forms
from keye.worker.model.precision import WEIGHT_SHARE
from keye.worker.model.processor import KeyeProcessor

# Beside the weights: CUDA's context, its kernels, the workspaces of its libraries. Seen on an H100 with torch 2.11.
CUDA_BYTES = int(0.9 * 2**30)

_HALF_BYTES = 2


class AliveTensors(TorchDispatchMode):
    """Bytes of the tensors on one kind of device that were alive at the same time, of those made within."""

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.peak = 0
        self._device_type = device_type
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage._cdata for storage in self._storages((args, kwargs))}
        if func is torch.ops.aten.scaled_dot_product_attention.default and self._device_type == "meta":
            # As a GPU's kernels do, which write out no matrix of scores.
            result = torch.empty_like(args[0])
        else:
            result = func(*args, **(kwargs or {}))
        for storage in self._storages(result):
            if storage._cdata not in given | self._alive.keys():
                self._alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self._alive.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self._alive.values()))
        return result

    def _storages(self, tree: Any) -> list[torch.UntypedStorage]:
        tensors = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))
        return [tensor.untyped_storage() for tensor in tensors if tensor.device.type == self._device_type]


@dataclass(frozen=True, slots=True)
class ModelMemory:
    """Bytes of the weights, of the largest step, of a video's token in the tower and of a token in the cache.

    `context` is what a sequence may have in tokens, `max_running` how many sequences run at once.
    """

    precision: PrecisionSetting
    weights: int
    step: int
    video_token: float
    token: int
    context: int
    block_size: int
    max_running: int

    @classmethod
    def of(cls, processor: KeyeProcessor, precision: PrecisionSetting, limits: StepLimits) -> Self:
        """Of the checkpoint that the processor is of; `auto` is what a GPU of these years takes."""
        config = processor.config
        dtype = getattr(torch, precision) if precision in ("float16", "float32") else torch.bfloat16
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
        model.visual.vision_model.embeddings.normalise = processor.image_processor.normalise
        step, video_token = largest_needs(model, processor, limits, _peak_bytes)
        has_packed = dtype != torch.float32 and config.head_dim % 8 == 0
        return cls(
            precision=precision,
            weights=int(WEIGHT_SHARE[precision] * _HALF_BYTES * model.num_parameters()),
            step=step,
            video_token=video_token,
            token=block_bytes(config, 1, dtype),
            context=config.max_position_embeddings,
            block_size=paged_forms(config.max_position_embeddings, has_packed)[0].block_size,
            max_running=limits.max_running,
        )

    def at(self, precision: PrecisionSetting) -> Self:
        """The same with weights shrunk to int8 or int4; all else stays in half precision."""
        share = WEIGHT_SHARE[precision] / WEIGHT_SHARE[self.precision]
        return replace(self, precision=precision, weights=int(share * self.weights))

    def cache_bytes(self, usable: int) -> int:
        """For keys and values, where weights, cache and the largest step may take `usable`; below zero: no room."""
        room = usable - self.weights - CUDA_BYTES
        return cache_bytes_within(room, self.step, self.token, self.video_token, self.context)

    def num_tokens(self, cache_bytes: int) -> int:
        """What a cache of so many bytes holds, in whole blocks."""
        num_blocks = count_blocks(
            cache_bytes, self.token * self.block_size, self.context, self.block_size, self.max_running
        )
        return self.block_size * max(num_blocks, 0)

    def usable_for(self, num_tokens: int) -> int:
        """The bytes that a cache of so many tokens asks for, with all beside it."""
        cache = -(-num_tokens // self.block_size) * self.block_size * self.token
        video = self.video_token * min(self.context, cache / self.token)
        return self.weights + CUDA_BYTES + cache + row_bytes(cache) + int(max(self.step, video)) + 1


def _peak_bytes(run: Callable[[], None]) -> int:
    with AliveTensors("meta") as alive:
        run()
    return alive.peak
