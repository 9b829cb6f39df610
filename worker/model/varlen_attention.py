"""Paged attention by `torch.nn.attention.varlen`: CUDA, half precision. With block tables from torch 2.13 on."""

from collections.abc import Sequence
from inspect import signature
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from keye.worker.model.paged_attention import AttentionCall, PagedCache, Span, all_slots, as_table

HAS_BLOCK_TABLES = "block_table" in signature(varlen_attn).parameters

_EVERY_KEY = (-1, -1)
_CAUSAL = (-1, 0)  # aligned at the end: a sequence's last query sees all its keys


class VarlenForm:
    """Decoding sequences share one call, prompts another."""

    name = "varlen_attn with block tables"
    block_size = 256  # what the kernel's blocks must be a multiple of

    def __init__(self, max_tokens: int) -> None:
        # The kernel shares a sequence out over the chip by the width of the table, so short ones want a narrow one.
        widest = -(-max_tokens // self.block_size)
        self.table_widths: Sequence[int] = sorted({min(width, widest) for width in (8, 32, 128, widest)})

    def calls(self, cache: PagedCache, spans: Sequence[Span]) -> list[AttentionCall]:
        return [self._call(cache, group) for group in split_decoding(spans) if group]

    def decoding(self, cache: PagedCache, block_tables: Tensor, lengths: Tensor) -> AttentionCall:
        num = len(lengths)
        borders = torch.arange(num + 1, dtype=torch.int32, device=lengths.device)
        max_keys = block_tables.shape[1] * cache.block_size
        return _PagedCall(block_tables, lengths, borders, num, 1, max_keys)

    def _call(self, cache: PagedCache, spans: Sequence[Span]) -> AttentionCall:
        device = cache.keys[0].device
        tables = as_table(spans, max(len(span.block_table) for span in spans), cache.scratch_block)
        num_queries = [span.num_queries for span in spans]
        num_keys = [span.num_keys for span in spans]
        return _PagedCall(
            torch.from_numpy(tables).to(device),
            torch.tensor(num_keys, dtype=torch.int32, device=device),
            _borders(num_queries, device),
            sum(num_queries),
            max(num_queries),
            max(num_keys),
        )


class _PagedCall:
    """Spans over the cache itself: tables int32 [n, width], tokens in the cache int32 [n], borders int32 [n + 1]."""

    def __init__(
        self,
        block_tables: Tensor,
        lengths: Tensor,
        borders: Tensor,
        num_queries: int,
        max_queries: int,
        max_keys: int,
    ) -> None:
        self.num_queries = num_queries
        self._block_tables = block_tables
        self._lengths = lengths
        self._borders = borders
        self._key_borders = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        self._max_queries = max_queries
        self._max_keys = max_keys

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        output = varlen_attn(
            query,
            keys,
            values,
            self._borders,
            self._key_borders,
            self._max_queries,
            self._max_keys,
            scale=scaling,
            # A single query sees every key. Told so, the kernel packs the query heads that share a key head.
            window_size=_EVERY_KEY if self._max_queries == 1 else _CAUSAL,
            enable_gqa=True,
            seqused_k=self._lengths,
            block_table=self._block_tables,
        )
        assert isinstance(output, Tensor)
        return output


class GatheredPrompts:
    """Spans over keys and values gathered from the cache and packed, for a torch without block tables."""

    def __init__(self, cache: PagedCache, spans: Sequence[Span]) -> None:
        device = cache.keys[0].device
        num_queries = [span.num_queries for span in spans]
        num_keys = [span.num_keys for span in spans]
        self.num_queries = sum(num_queries)
        self._slots = torch.from_numpy(all_slots(spans, cache.block_size)).to(device)
        self._borders = (_borders(num_queries, device), _borders(num_keys, device))
        self._longest = (max(num_queries), max(num_keys))

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        key, value = (paged.flatten(0, 1).index_select(0, self._slots) for paged in (keys, values))
        # Key heads are repeated because this torch does not promise to share them.
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        output = varlen_attn(query, key, value, *self._borders, *self._longest, scale=scaling, window_size=_CAUSAL)
        assert isinstance(output, Tensor)
        return output


def split_decoding(spans: Sequence[Span]) -> tuple[Sequence[Span], Sequence[Span]]:
    """The spans before the first of several queries, and the others."""
    num = next((i for i, span in enumerate(spans) if span.num_queries > 1), len(spans))
    return spans[:num], spans[num:]


def _borders(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
