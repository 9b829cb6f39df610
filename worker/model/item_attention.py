"""Attention of packed items, images or frames, each within itself: the forms in which a device may do it."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

from keye.worker.model.device import send

AttendItems = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries, keys, values [patches, heads, head_dim] to outputs of the same shape."""


class ItemForm(Protocol):
    """A way to attend within items on some device."""

    name: str

    def attention(self, lengths: Sequence[int], device: torch.device) -> AttendItems:
        """The attention of packed items of these lengths; made once a pass, used in every layer."""


class VarlenItems:
    """All items in one call, on CUDA in half precision."""

    name = "varlen_attn"

    def attention(self, lengths: Sequence[int], device: torch.device) -> AttendItems:
        borders = send(np.array([0, *accumulate(lengths)], np.int32), device)
        longest = max(lengths)
        # As wide as the longest item, which is no window at all; without one, torch 2.14 gives Hopper's calls to cuDNN,
        # which plans each new shape for tens of milliseconds and never forgets one.
        window = (longest, longest)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            output = varlen_attn(query, key, value, borders, borders, longest, longest, window_size=window)
            assert isinstance(output, Tensor)
            return output

        return attend


class EqualItems:
    """Items of equal length share a call; asks nothing of the device."""

    name = "scaled_dot_product_attention"

    def attention(self, lengths: Sequence[int], device: torch.device) -> AttendItems:
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
            send(np.array(item_starts), device).unsqueeze(1) + torch.arange(length, device=device)
            for length, item_starts in by_length.items()
        ]

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            output = torch.empty_like(query)
            for rows in rows_of:
                q, k, v = (x[rows].transpose(1, 2) for x in (query, key, value))
                output[rows] = scaled_dot_product_attention(q, k, v).transpose(1, 2)
            return output

        return attend
