"""Attention over a paged cache: packed tokens of many sequences, each with its own blocks of keys and values.

Registers itself with transformers as `keye_paged`. Who owns which block is decided elsewhere.
"""

from collections.abc import Iterator, Sequence
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

    This form asks nothing of the device. Neighbours with one query each share a call, padded to the longest of them.
    """

    def __init__(self, cache: PagedCache, spans: Sequence[Span]) -> None:
        self._cache = cache
        device = cache.keys[0].device
        self._slots = _slots(spans, cache.block_size).to(device)
        self._groups = []
        row = 0
        for group in _groups(spans):
            rows = slice(row, row + sum(span.num_queries for span in group))
            row = rows.stop
            self._groups.append(_SharedCall(group, rows, cache.block_size, device))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Store the step's keys and values, then attend.

        Queries [1, heads, T, d], keys and values [1, kv_heads, T, d] to outputs [1, T, heads, d].
        """
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        for paged, new in ((keys, key), (values, value)):
            paged.flatten(0, 1).index_copy_(0, self._slots, new[0].transpose(0, 1))
        outputs = [group.attend(query[0], keys, values, scaling) for group in self._groups]
        return torch.cat(outputs).unsqueeze(0)


class _SharedCall:
    """Spans that go through one call of the kernel: several of one query each, or one of several."""

    def __init__(self, spans: Sequence[Span], rows: slice, block_size: int, device: torch.device) -> None:
        self._rows = rows
        self._num_spans = len(spans)
        num_blocks = max(len(span.block_table) for span in spans)
        blocks: list[int] = []
        for table, _, _ in spans:
            blocks += table
            # Padding reads the sequence's own first block, masked: no sequence ever reads another's.
            blocks += table[:1] * (num_blocks - len(table))
        # By way of numpy: torch reads a list of numbers five times slower, and this happens at every step.
        self._blocks = torch.from_numpy(np.array(blocks)).to(device)
        if len(spans) == 1:
            self._num_keys = spans[0].num_keys
            self._mask = _causal_mask(spans[0], device)
        else:
            self._num_keys = num_blocks * block_size
            lengths = torch.tensor([span.num_keys for span in spans]).view(-1, 1, 1, 1)
            self._mask = (torch.arange(self._num_keys) < lengths).to(device)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        """All queries [heads, T, d] and one layer's cache to the outputs [n, heads, d] of these spans' n queries."""
        own = query[:, self._rows].unflatten(1, (self._num_spans, -1)).transpose(0, 1)
        output = scaled_dot_product_attention(
            own,
            self._gather(keys),
            self._gather(values),
            attn_mask=self._mask,
            is_causal=self._mask is None,
            scale=scaling,
            enable_gqa=True,
        )
        return output.transpose(1, 2).flatten(0, 1)

    def _gather(self, paged: Tensor) -> Tensor:
        """[spans, kv_heads, num_keys, d]"""
        gathered = paged.index_select(0, self._blocks).view(self._num_spans, -1, *paged.shape[2:])
        return gathered[:, : self._num_keys].transpose(1, 2)


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


def _groups(spans: Sequence[Span]) -> Iterator[list[Span]]:
    """Runs of neighbours that share a call."""
    group: list[Span] = []
    for span in spans:
        if group and not _can_share_call(group[0], span):
            yield group
            group = []
        group.append(span)
    yield group


def _can_share_call(one: Span, other: Span) -> bool:
    """One query each, and little to pad: a long sequence must not make all others as slow as itself."""
    lengths = sorted((len(one.block_table), len(other.block_table)))
    return one.num_queries == other.num_queries == 1 and lengths[1] <= 4 * lengths[0]


def _slots(spans: Sequence[Span], block_size: int) -> Tensor:
    """Where the key and the value of each packed token are stored, counted in tokens from the start of the cache."""
    slots: list[int] = []
    for table, num_queries, num_keys in spans:
        if num_queries == 1:
            last = num_keys - 1
            slots.append(table[last // block_size] * block_size + last % block_size)
        else:
            tokens = np.arange(num_keys - num_queries, num_keys)
            slots += (np.array(table)[tokens // block_size] * block_size + tokens % block_size).tolist()
    return torch.from_numpy(np.array(slots))


def _causal_mask(span: Span, device: torch.device) -> Tensor | None:
    """Bool [num_queries, num_keys]; None where the queries are the whole sequence, which kernels know as causal."""
    if span.num_queries == span.num_keys:
        return None
    tokens = torch.arange(span.num_keys, device=device)
    return tokens <= tokens[-span.num_queries :].unsqueeze(1)
