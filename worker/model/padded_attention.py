"""Attention of a padded batch, as transformers keeps it: a mask, a cache, and the kernel that the config names.

For `generate`, training and comparisons; an engine's pass is packed and paged, and needs none of it.
"""

from collections.abc import Callable
from typing import cast

from torch import Tensor
from transformers import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3.modeling_qwen3 import eager_attention_forward

from keye.worker.model.text_decoder import Attend, KeyeDecoderLayer, KeyeTextModel


def attend_padded(
    decoder: KeyeTextModel, inputs_embeds: Tensor, attention_mask: Tensor | None = None, cache: Cache | None = None
) -> Attend:
    """Causal attention of embeddings [B, L, H] among themselves and over what `cache` holds, which takes the new ones.

    `attention_mask` [B, tokens in the cache and new ones] is 0 at padding; None where there is no padding.
    """
    # By position: releases of this major differ in what they call a cache.
    mask = create_causal_mask(decoder.config, inputs_embeds, attention_mask, cache)
    kernel: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
        decoder.config._attn_implementation, eager_attention_forward
    )

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        if cache is not None:
            key, value = cache.update(key, value, layer)
        module = cast(KeyeDecoderLayer, decoder.layers[layer]).self_attn
        dropout = module.attention_dropout if module.training else 0.0
        return kernel(module, query, key, value, mask, dropout=dropout, scaling=scaling)[0]

    return attend
