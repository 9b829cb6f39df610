"""Paged attention by gathering the blocks of each sequence, which asks nothing of the device."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from keye.worker.model.paged_attention import AttentionCall, PagedCache, Span, as_table


class GatheredForm:
    """Neighbours with one query each share a call, padded to the longest of them."""

    name = "gathered blocks, scaled_dot_product_attention"
    block_size = 16
    table_widths: Sequence[int] = ()

    def calls(self, cache: PagedCache, spans: Sequence[Span]) -> list[AttentionCall]:
        device = cache.keys[0].device
        return [_call(cache, group, device) for group in _groups(spans)]

    def decoding(self, cache: PagedCache, block_tables: Tensor, lengths: Tensor) -> AttentionCall:
        return _Decoding(block_tables, lengths, cache.block_size)


class _Decoding:
    """One query each of several sequences."""

    def __init__(self, block_tables: Tensor, lengths: Tensor, block_size: int) -> None:
        self.num_queries, num_blocks = block_tables.shape
        self._blocks = block_tables.flatten()
        tokens = torch.arange(num_blocks * block_size, device=lengths.device)
        self._mask = tokens < lengths.view(-1, 1, 1, 1)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        output = scaled_dot_product_attention(
            query.unsqueeze(2),
            self._gather(keys),
            self._gather(values),
            attn_mask=self._mask,
            scale=scaling,
            enable_gqa=True,
        )
        return output.squeeze(2)

    def _gather(self, paged: Tensor) -> Tensor:
        """[n, kv_heads, tokens, d]"""
        return paged.index_select(0, self._blocks).view(self.num_queries, -1, *paged.shape[2:]).transpose(1, 2)


class _Prompt:
    """Several queries of one sequence."""

    def __init__(self, span: Span, device: torch.device) -> None:
        table, self.num_queries, self._num_keys = span
        self._blocks = torch.tensor(table, device=device)
        self._mask = _causal_mask(span, device)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        output = scaled_dot_product_attention(
            query.transpose(0, 1).unsqueeze(0),
            self._gather(keys),
            self._gather(values),
            attn_mask=self._mask,
            is_causal=self._mask is None,
            scale=scaling,
            enable_gqa=True,
        )
        return output[0].transpose(0, 1)

    def _gather(self, paged: Tensor) -> Tensor:
        """[1, kv_heads, num_keys, d]"""
        return paged.index_select(0, self._blocks).flatten(0, 1)[: self._num_keys].transpose(0, 1).unsqueeze(0)


def _call(cache: PagedCache, spans: Sequence[Span], device: torch.device) -> AttentionCall:
    if len(spans) == 1:
        return _Prompt(spans[0], device)
    width = max(len(span.block_table) for span in spans)
    tables = torch.from_numpy(as_table(spans, width, cache.scratch_block)).to(device)
    return _Decoding(tables, torch.tensor([span.num_keys for span in spans], device=device), cache.block_size)


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


def _causal_mask(span: Span, device: torch.device) -> Tensor | None:
    """Bool [num_queries, num_keys]; None where the queries are the whole sequence, which kernels know as causal."""
    if span.num_queries == span.num_keys:
        return None
    tokens = torch.arange(span.num_keys, device=device)
    return tokens <= tokens[-span.num_queries :].unsqueeze(1)
