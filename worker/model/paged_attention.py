"""Attention over a paged cache: packed tokens of many sequences, each with its own blocks of keys and values.

Registers itself with transformers as `keye_paged`. Who owns which block is decided elsewhere.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

PAGED_ATTENTION = "keye_paged"


class Span(NamedTuple):
    """A run of packed tokens of one sequence: the last `num_queries` of its `num_keys` tokens."""

    block_table: list[int]
    num_queries: int
    num_keys: int


class PagedCache(Protocol):
    """For each layer, keys and values [num_blocks, block_size, kv_heads, head_dim]."""

    block_size: int
    keys: list[Tensor]
    values: list[Tensor]


class PagedBatch:
    """One step's packed tokens and where their keys and values lie; attends by gathering the blocks.

    This form asks nothing of the device. Sequences with one token each share a call, padded to the longest of them.
    """

    def __init__(self, cache: PagedCache, spans: Sequence[Span]) -> None:
        self._cache = cache
        device = cache.keys[0].device
        self._num_single = next((i for i, span in enumerate(spans) if span.num_queries > 1), len(spans))
        single, longer = spans[: self._num_single], spans[self._num_single :]
        slots = [_slots(span, cache.block_size) for span in longer]
        if single:
            slots.insert(0, _last_slots(single, cache.block_size))
            # Padding reads a sequence's own first block, masked, so that no sequence ever reads another's.
            longest = max(len(span.block_table) for span in single)
            blocks: list[int] = []
            for table, _, _ in single:
                blocks += table
                blocks += table[:1] * (longest - len(table))
            # By way of numpy: torch reads a list of numbers five times slower, and this happens at every step.
            self._single_blocks = torch.from_numpy(np.array(blocks)).to(device)
            num_keys = torch.tensor([span.num_keys for span in single]).view(-1, 1, 1, 1)
            self._single_mask = (torch.arange(longest * cache.block_size) < num_keys).to(device)
        self._slots = torch.cat(slots).to(device)
        self._longer = [
            (span.num_queries, torch.tensor(span.block_table, device=device), span.num_keys, _causal_mask(span, device))
            for span in longer
        ]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Store the step's keys and values, then attend.

        Queries [1, heads, T, d], keys and values [1, kv_heads, T, d] to outputs [1, T, heads, d].
        """
        kv_heads, head_dim = key.shape[1], key.shape[3]
        for paged, new in ((self._cache.keys[layer], key), (self._cache.values[layer], value)):
            paged.view(-1, kv_heads, head_dim).index_copy_(0, self._slots, new[0].transpose(0, 1))
        outputs = []
        if count := self._num_single:
            keys, values = self._gather(layer, self._single_blocks, count)
            output = scaled_dot_product_attention(
                query[0, :, :count].transpose(0, 1).unsqueeze(2),
                keys,
                values,
                attn_mask=self._single_mask,
                scale=scaling,
                enable_gqa=True,
            )
            outputs.append(output.squeeze(2))
        start = count
        for num_queries, blocks, num_keys, mask in self._longer:
            keys, values = self._gather(layer, blocks, 1)
            output = scaled_dot_product_attention(
                query[:, :, start : start + num_queries],
                keys[:, :, :num_keys],
                values[:, :, :num_keys],
                attn_mask=mask,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=True,
            )
            outputs.append(output[0].transpose(0, 1))
            start += num_queries
        return torch.cat(outputs).unsqueeze(0)

    def _gather(self, layer: int, blocks: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Keys and values [count, kv_heads, tokens, d] of `count` sequences with the same number of blocks."""
        keys, values = (
            paged.index_select(0, blocks).view(count, -1, *paged.shape[2:]).transpose(1, 2)
            for paged in (self._cache.keys[layer], self._cache.values[layer])
        )
        return keys, values


def paged_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    batch: PagedBatch,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention function of a decoder layer whose caller gives a `batch`; the mask is the batch's own matter."""
    return batch.attend(module.layer_idx, query, key, value, scaling), None


AttentionInterface.register(PAGED_ATTENTION, paged_attention)


def _last_slots(spans: Sequence[Span], block_size: int) -> Tensor:
    last = ((span.block_table, span.num_keys - 1) for span in spans)
    return torch.tensor([table[at // block_size] * block_size + at % block_size for table, at in last])


def _slots(span: Span, block_size: int) -> Tensor:
    tokens = torch.arange(span.num_keys - span.num_queries, span.num_keys)
    return torch.tensor(span.block_table)[tokens // block_size] * block_size + tokens % block_size


def _causal_mask(span: Span, device: torch.device) -> Tensor | None:
    """Bool [num_queries, num_keys]; None where the queries are the whole sequence, which kernels know as causal."""
    if span.num_queries == span.num_keys:
        return None
    tokens = torch.arange(span.num_keys, device=device)
    return tokens <= tokens[-span.num_queries :].unsqueeze(1)
