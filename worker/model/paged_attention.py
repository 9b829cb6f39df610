"""Attention over a paged cache: packed tokens of many sequences, each with its own blocks of keys and values.

Which kernels run is the form's matter: here is the one that asks nothing of the device, `cuda_attention.py` has those
for CUDA. Who owns which block is decided elsewhere.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from keye.worker.model.configuration_keye import KeyeConfig
from keye.worker.model.device import send
from keye.worker.model.text_decoder import Attend


class Span(NamedTuple):
    """A run of packed tokens of one sequence: the last `num_queries` of its `num_keys` tokens."""

    block_table: list[int]
    num_queries: int
    num_keys: int


class KVCache:
    """For each layer, keys and values [num_blocks + 1, block_size, kv_heads, head_dim].

    The block behind the others is nobody's: rows that only fill a batch up write and read there.
    """

    def __init__(
        self, config: KeyeConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.device = device
        self.scratch_block = num_blocks
        self.block_size = block_size
        shape = (num_blocks + 1, block_size, config.num_key_value_heads, config.head_dim)
        self.keys = [_zeros(shape, dtype, device) for _ in range(config.num_hidden_layers)]
        self.values = [_zeros(shape, dtype, device) for _ in range(config.num_hidden_layers)]

    def slots(self, spans: Sequence[Span]) -> Tensor:
        """Where each packed token's key and value are stored, in tokens from the start of the cache: int64 [T]."""
        slots: list[int] = []
        for table, num_queries, num_keys in spans:
            if num_queries == 1:
                last = num_keys - 1
                slots.append(table[last // self.block_size] * self.block_size + last % self.block_size)
            else:
                tokens = np.arange(num_keys - num_queries, num_keys)
                blocks = np.array(table)[tokens // self.block_size]
                slots += (blocks * self.block_size + tokens % self.block_size).tolist()
        # By way of numpy: torch reads a list of numbers five times slower, and this happens at every step.
        return send(np.array(slots), self.device)

    def tables(self, spans: Sequence[Span], width: int = 0) -> tuple[Tensor, Tensor]:
        """Block tables int32 [spans, width], behind a sequence's own the scratch block, and numbers of keys int32 [n].

        Width 0 is what the longest takes.
        """
        width = width or max(len(span.block_table) for span in spans)
        rows = [table + [self.scratch_block] * (width - len(table)) for table, _, _ in spans]
        lengths = [span.num_keys for span in spans]
        return send(np.array(rows, np.int32), self.device), send(np.array(lengths, np.int32), self.device)

    def wipe(self, blocks: list[int]) -> None:
        """Take out numbers that are not finite before another sequence gets the blocks."""
        rows = send(np.array(blocks), self.device)
        for layer in (*self.keys, *self.values):
            layer.index_fill_(0, rows, 0)

    def let_go(self) -> None:
        """Of all keys and values, whoever still holds the cache itself."""
        self.keys.clear()
        self.values.clear()


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, not whatever lay there: a masked slot is multiplied by 0, and 0 times NaN is NaN."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # From the kernel, which makes a page when it is first written to; torch would write to all of them.
    pages = np.zeros((*shape[:-1], shape[-1] * dtype.itemsize), dtype=np.uint8)
    return torch.from_numpy(pages).view(dtype)


class AttentionCall(NamedTuple):
    """One call of a kernel for neighbouring packed tokens; made once a step, used in every layer.

    `attend` takes queries [num_queries, heads, d], one layer's keys and values of the cache, and the scaling of
    scores, and gives outputs [num_queries, heads, d].
    """

    num_queries: int
    attend: Callable[[Tensor, Tensor, Tensor, float], Tensor]


class AttentionForm(Protocol):
    """A way to attend on some device.

    `block_size` is what its kernels take, `table_widths` are the widths, in blocks, that decoding is best captured
    at; none where it cannot be captured.
    """

    name: str
    block_size: int
    table_widths: Sequence[int]

    def calls(self, cache: KVCache, spans: Sequence[Span]) -> list[AttentionCall]:
        """The calls that serve all spans, in their order."""

    def decoding(self, cache: KVCache, block_tables: Tensor, lengths: Tensor) -> AttentionCall:
        """The call for one query each of n sequences: tables int32 [n, width], tokens in the cache int32 [n]."""


def attend_spans(form: AttentionForm, cache: KVCache, spans: Sequence[Span]) -> Attend:
    """One step's packed tokens: their keys and values are stored, then the form's calls attend for them."""
    return _attend(cache, cache.slots(spans), form.calls(cache, spans))


def attend_decoding(form: AttentionForm, cache: KVCache, block_tables: Tensor, lengths: Tensor) -> Attend:
    """The same for one token each of n sequences, from tensors alone, so that it can be captured in a graph."""
    last = (lengths - 1).long().unsqueeze(1)
    blocks = block_tables.gather(1, last // cache.block_size).long()
    slots = (blocks * cache.block_size + last % cache.block_size).squeeze(1)
    return _attend(cache, slots, [form.decoding(cache, block_tables, lengths)])


def _attend(cache: KVCache, slots: Tensor, calls: Sequence[AttentionCall]) -> Attend:
    num_queries = [call.num_queries for call in calls]

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """The packed tokens are the one row of a batch.

        Queries [1, heads, T, d], keys and values [1, kv_heads, T, d] to outputs [1, T, heads, d].
        """
        keys, values = cache.keys[layer], cache.values[layer]
        for paged, new in ((keys, key), (values, value)):
            paged.flatten(0, 1).index_copy_(0, slots, new[0].transpose(0, 1))
        parts = query[0].transpose(0, 1).split(num_queries)
        outputs = [call.attend(part, keys, values, scaling) for call, part in zip(calls, parts, strict=True)]
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).unsqueeze(0)

    return attend


class GatheredForm:
    """Gathers the blocks of each sequence. Neighbours with one query each share a call, padded to the longest."""

    name = "scaled_dot_product_attention over gathered blocks"
    block_size = 16
    table_widths: Sequence[int] = ()

    def calls(self, cache: KVCache, spans: Sequence[Span]) -> list[AttentionCall]:
        return [
            self._prompt(cache, group[0]) if group[0].num_queries > 1 else self.decoding(cache, *cache.tables(group))
            for group in _groups(spans)
        ]

    def decoding(self, cache: KVCache, block_tables: Tensor, lengths: Tensor) -> AttentionCall:
        num, width = block_tables.shape
        tokens = torch.arange(width * cache.block_size, device=lengths.device)
        is_own = tokens < lengths.view(-1, 1, 1, 1)

        def attend(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
            key, value = (_gather(paged, block_tables) for paged in (keys, values))
            # The query heads that share a key head are its queries: they see the same keys.
            grouped = query.unflatten(1, (key.shape[1], -1))
            output = scaled_dot_product_attention(grouped, key, value, attn_mask=is_own, scale=scaling)
            return output.flatten(1, 2)

        return AttentionCall(num, attend)

    def _prompt(self, cache: KVCache, span: Span) -> AttentionCall:
        mask = None  # Where the queries are the whole sequence, kernels know it as causal.
        if span.num_queries < span.num_keys:
            tokens = torch.arange(span.num_keys, device=cache.device)
            mask = tokens <= tokens[-span.num_queries :].unsqueeze(1)
        block_table = send(np.array([span.block_table]), cache.device)
        # Told to share key heads, CUDA's kernels for float32 and before Ampere refuse: there the heads are repeated.
        can_share = cache.device.type == "cpu"

        def attend(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
            key, value = (_gather(paged, block_table)[:, :, : span.num_keys] for paged in (keys, values))
            if not can_share:
                key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
            output = scaled_dot_product_attention(
                query.transpose(0, 1).unsqueeze(0),
                key,
                value,
                attn_mask=mask,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=can_share,
            )
            return output[0].transpose(0, 1)

        return AttentionCall(span.num_queries, attend)


def _gather(paged: Tensor, block_tables: Tensor) -> Tensor:
    """The blocks of n sequences one behind the other: [n, kv_heads, width * block_size, d]."""
    blocks = paged.index_select(0, block_tables.flatten())
    return blocks.view(len(block_tables), -1, *paged.shape[2:]).transpose(1, 2)


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
    if not one.num_queries == other.num_queries == 1:
        return False
    return len(one.block_table) <= 4 * len(other.block_table) and len(other.block_table) <= 4 * len(one.block_table)
