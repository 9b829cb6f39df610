"""Attention over a paged cache: packed tokens of many sequences, each with its own blocks of keys and values.

Which kernels run is the form's matter; who owns which block is decided elsewhere.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor


class Span(NamedTuple):
    """A run of packed tokens of one sequence: the last `num_queries` of its `num_keys` tokens."""

    block_table: list[int]
    num_queries: int
    num_keys: int


class PagedCache(Protocol):
    """For each layer, keys and values [blocks, block_size, kv_heads, head_dim]. The last block belongs to nobody."""

    block_size: int
    scratch_block: int
    keys: list[Tensor]
    values: list[Tensor]


class AttentionCall(Protocol):
    """One call of a kernel for neighbouring packed tokens; made once a step, used in every layer."""

    num_queries: int

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        """Queries [num_queries, heads, d] and one layer's cache to outputs [num_queries, heads, d]."""


class AttentionForm(Protocol):
    """A way to attend on some device.

    `block_size` is what its kernels take, `table_widths` are the widths, in blocks, that decoding is best captured
    at; none where it cannot be captured.
    """

    name: str
    block_size: int
    table_widths: Sequence[int]

    def calls(self, cache: PagedCache, spans: Sequence[Span]) -> Sequence[AttentionCall]:
        """The calls that serve all spans, in their order."""

    def decoding(self, cache: PagedCache, block_tables: Tensor, lengths: Tensor) -> AttentionCall:
        """The call for one query each of n sequences: tables int32 [n, width], tokens in the cache int32 [n]."""


class PagedBatch:
    """One step's packed tokens: where their keys and values go, and the calls that attend for them."""

    def __init__(self, cache: PagedCache, slots: Tensor, calls: Sequence[AttentionCall]) -> None:
        self._cache = cache
        self._slots = slots
        self._calls = calls
        self._num_queries = [call.num_queries for call in calls]

    @classmethod
    def of_spans(cls, form: AttentionForm, cache: PagedCache, spans: Sequence[Span]) -> "PagedBatch":
        slots = torch.from_numpy(new_slots(spans, cache.block_size)).to(cache.keys[0].device)
        return cls(cache, slots, form.calls(cache, spans))

    @classmethod
    def of_decoding(cls, form: AttentionForm, cache: PagedCache, block_tables: Tensor, lengths: Tensor) -> "PagedBatch":
        """The same for one token each of n sequences, from tensors alone, so that it can be captured in a graph."""
        last = (lengths - 1).long().unsqueeze(1)
        blocks = block_tables.gather(1, last // cache.block_size).long()
        slots = (blocks * cache.block_size + last % cache.block_size).squeeze(1)
        return cls(cache, slots, [form.decoding(cache, block_tables, lengths)])

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Store the step's keys and values, then attend: the packed tokens are the one row of a batch.

        Queries [1, heads, T, d], keys and values [1, kv_heads, T, d] to outputs [1, T, heads, d].
        """
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        for paged, new in ((keys, key), (values, value)):
            paged.flatten(0, 1).index_copy_(0, self._slots, new[0].transpose(0, 1))
        parts = query[0].transpose(0, 1).split(self._num_queries)
        outputs = [call.attend(part, keys, values, scaling) for call, part in zip(self._calls, parts, strict=True)]
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).unsqueeze(0)


def new_slots(spans: Sequence[Span], block_size: int) -> np.ndarray:
    """Where each packed token's key and value are stored, in tokens from the start of the cache: int64 [T]."""
    slots: list[int] = []
    for table, num_queries, num_keys in spans:
        if num_queries == 1:
            last = num_keys - 1
            slots.append(table[last // block_size] * block_size + last % block_size)
        else:
            slots += _slots_of(table, num_keys - num_queries, num_keys, block_size).tolist()
    # By way of numpy: torch reads a list of numbers five times slower, and this happens at every step.
    return np.array(slots)


def all_slots(spans: Sequence[Span], block_size: int) -> np.ndarray:
    """The same for every token the spans' sequences have in the cache, sequence by sequence: int64 [sum num_keys]."""
    return np.concatenate([_slots_of(table, 0, num_keys, block_size) for table, _, num_keys in spans])


def _slots_of(table: list[int], start: int, stop: int, block_size: int) -> np.ndarray:
    tokens = np.arange(start, stop)
    slots: np.ndarray = np.array(table)[tokens // block_size] * block_size + tokens % block_size
    return slots


def as_table(spans: Sequence[Span], width: int, padding: int) -> np.ndarray:
    """Block tables int32 [spans, width]; entries behind a sequence's own are `padding`."""
    rows = [table + [padding] * (width - len(table)) for table, _, _ in spans]
    return np.array(rows, dtype=np.int32)
