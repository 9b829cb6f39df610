"""Attention that never leaves an item: packed patches of many images and frames, no padding. Chosen once per pass."""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

from keye.worker.model.device import has_packed_kernels

ItemAttention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries, keys, values [patches, heads, head_dim] to outputs of the same shape."""


def item_attention(lengths: Sequence[int], head_dim: int, device: torch.device, dtype: torch.dtype) -> ItemAttention:
    """The attention for packed items of these lengths: the packed kernel where one runs, else one call a length."""
    if has_packed_kernels(device, dtype, head_dim):
        return _packed(lengths, device)
    return _batched_by_length(lengths, device)


def _packed(lengths: Sequence[int], device: torch.device) -> ItemAttention:
    borders = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    longest = max(lengths)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = varlen_attn(query, key, value, borders, borders, longest, longest)
        assert isinstance(output, Tensor)
        return output

    return attend


def _batched_by_length(lengths: Sequence[int], device: torch.device) -> ItemAttention:
    starts = [0, *accumulate(lengths)]
    by_length: dict[int, list[int]] = {}
    for start, length in zip(starts, lengths, strict=False):
        by_length.setdefault(length, []).append(start)
    if len(by_length) == 1:
        (length,) = by_length

        def attend_equal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            query, key, value = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (query, key, value))
            return scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(0, 1)

        return attend_equal

    rows_of = [
        torch.tensor(item_starts, device=device).unsqueeze(1) + torch.arange(length, device=device)
        for length, item_starts in by_length.items()
    ]

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        for rows in rows_of:
            q, k, v = (x[rows].transpose(1, 2) for x in (query, key, value))
            output[rows] = scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return output

    return attend
