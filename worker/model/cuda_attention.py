"""Paged attention on CUDA, in half precision, by `torch.nn.attention.varlen`.

It has block tables from torch 2.12 on; before, FlexAttention decodes over the blocks.
"""

from collections.abc import Callable, Sequence
from functools import cache
from inspect import signature
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.attention.varlen import varlen_attn

from keye.worker.model.device import send
from keye.worker.model.paged_attention import AttentionCall, KVCache, Span

HAS_BLOCK_TABLES = "block_table" in signature(varlen_attn).parameters

# Split over the keys, a call for several queries of several sequences leaves the rows of all but the first unwritten
# (pytorch issue 194167; in the sources of 2.13 and 2.14). A torch without this argument does not split such a call.
_UNSPLIT: dict[str, Any] = {"num_splits": 1} if "num_splits" in signature(varlen_attn).parameters else {}

_EVERY_KEY = (-1, -1)

# Seven sizes of batch in each of the proof's caches, the trial's and the engine's own, with room to spare.
_MAX_COMPILED_SHAPES = 128
_CAUSAL = (-1, 0)  # aligned at the end: a sequence's last query sees all its keys


class VarlenForm:
    """Decoding sequences share one call, prompts another."""

    name = "varlen_attn over block tables"
    block_size = 256  # what the kernel's blocks must be a multiple of

    def __init__(self, max_tokens: int) -> None:
        # The kernel shares a sequence out over the chip by the width of the table, so short ones want a narrow one.
        widest = -(-max_tokens // self.block_size)
        self.table_widths: Sequence[int] = sorted({min(width, widest) for width in (8, 32, 128, widest)})

    def calls(self, cache: KVCache, spans: Sequence[Span]) -> list[AttentionCall]:
        return [self._call(cache, group) for group in _split_decoding(spans) if group]

    def decoding(self, cache: KVCache, block_tables: Tensor, lengths: Tensor) -> AttentionCall:
        num, width = block_tables.shape
        borders = torch.arange(num + 1, dtype=torch.int32, device=lengths.device)
        return _paged_call(block_tables, lengths, borders, num, 1, width * cache.block_size)

    def _call(self, cache: KVCache, spans: Sequence[Span]) -> AttentionCall:
        _, num_queries, num_keys = zip(*spans, strict=True)
        borders = _borders(num_queries, cache.device)
        return _paged_call(*cache.tables(spans), borders, sum(num_queries), max(num_queries), max(num_keys))


class FlexForm:
    """Decoding sequences share one call, padded to a power of two of them; prompts share another."""

    name = "flex_attention over blocks, varlen_attn for prompts"
    block_size = 128

    def __init__(self, max_tokens: int) -> None:
        self.table_widths: Sequence[int] = (-(-max_tokens // self.block_size),)

    def calls(self, cache: KVCache, spans: Sequence[Span]) -> list[AttentionCall]:
        decoding, prompts = _split_decoding(spans)
        calls = []
        if decoding:
            num_nobodys = (1 << (len(decoding) - 1).bit_length()) - len(decoding)
            rows = [*decoding, *[Span([], 1, 1)] * num_nobodys]
            calls.append(_flex_call(cache, *cache.tables(rows, self.table_widths[0]), len(decoding)))
        if prompts:
            calls.append(_gathered_call(cache, prompts))
        return calls

    def decoding(self, cache: KVCache, block_tables: Tensor, lengths: Tensor) -> AttentionCall:
        return _flex_call(cache, block_tables, lengths, len(lengths))


def _paged_call(
    block_tables: Tensor, lengths: Tensor, borders: Tensor, num_queries: int, max_queries: int, max_keys: int
) -> AttentionCall:
    """Spans over the cache itself: tables int32 [n, width], tokens in the cache int32 [n], borders int32 [n + 1]."""
    key_borders = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    # A single query goes another way, which writes all rows, and which a split makes faster.
    splits = _UNSPLIT if max_queries > 1 else {}

    def attend(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        output = varlen_attn(
            query,
            keys,
            values,
            borders,
            key_borders,
            max_queries,
            max_keys,
            scale=scaling,
            # A single query sees every key. Told so, the kernel packs the query heads that share a key head.
            window_size=_EVERY_KEY if max_queries == 1 else _CAUSAL,
            enable_gqa=True,
            seqused_k=lengths,
            block_table=block_tables,
            **splits,
        )
        assert isinstance(output, Tensor)
        return output

    return AttentionCall(num_queries, attend)


def _gathered_call(cache: KVCache, spans: Sequence[Span]) -> AttentionCall:
    """Spans over keys and values gathered from the cache and packed, for a torch without block tables."""
    _, num_queries, num_keys = zip(*spans, strict=True)
    slots = cache.slots([Span(table, num, num) for table, _, num in spans])
    borders = _borders(num_queries, cache.device), _borders(num_keys, cache.device)
    longest = max(num_queries), max(num_keys)

    def attend(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        key, value = (paged.flatten(0, 1).index_select(0, slots) for paged in (keys, values))
        # Key heads are repeated because this torch does not promise to share them.
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        output = varlen_attn(query, key, value, *borders, *longest, scale=scaling, window_size=_CAUSAL)
        assert isinstance(output, Tensor)
        return output

    return AttentionCall(sum(num_queries), attend)


def _flex_call(cache: KVCache, block_tables: Tensor, lengths: Tensor, num_queries: int) -> AttentionCall:
    """One query each of the first `num_queries` of n sequences: tables int32 [n, width], lengths int32 [n]."""
    mask = _block_mask(block_tables, lengths, cache)
    num_nobodys = len(lengths) - num_queries

    def attend(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        # The whole cache is one long sequence of keys [1, kv_heads, slots, d], of which the mask shows each its own.
        key, value = (paged.flatten(0, 1).transpose(0, 1).unsqueeze(0) for paged in (keys, values))
        # Contiguous, because other strides would be compiled for anew.
        padded = torch.nn.functional.pad(query, (0, 0, 0, 0, 0, num_nobodys)).contiguous()
        output = _compiled_flex_attention()(
            padded.unsqueeze(2), key, value, block_mask=mask, scale=scaling, enable_gqa=True
        )
        return output[:num_queries].squeeze(2)

    return AttentionCall(num_queries, attend)


def _block_mask(block_tables: Tensor, lengths: Tensor, cache: KVCache) -> BlockMask:
    """Each sequence sees its own tokens.

    No block is declared full although nearly all are: with full blocks the kernel shares out the whole cache instead
    of each sequence's own length, and one sequence would be one program's work.
    """
    num, width = block_tables.shape
    block_size, num_blocks = cache.block_size, len(cache.keys[0])
    # Which block of its sequence each block of the cache is; one of somebody else comes behind all tokens.
    order = torch.full((num, num_blocks), width, dtype=torch.int32, device=lengths.device)
    places = torch.arange(width, dtype=torch.int32, device=lengths.device).expand(num, -1)
    order.scatter_reduce_(1, block_tables.long(), places, "amin")

    def is_own(sequence: Tensor, head: Tensor, query: Tensor, slot: Tensor) -> Tensor:
        return order[sequence, slot // block_size] * block_size + slot % block_size < lengths[sequence]

    return BlockMask.from_kv_blocks(
        kv_num_blocks=((lengths + block_size - 1) // block_size).view(num, 1, 1),
        kv_indices=block_tables.view(num, 1, 1, width),
        BLOCK_SIZE=(block_size, block_size),
        mask_mod=is_own,
        seq_lengths=(1, num_blocks * block_size),
        compute_q_blocks=False,
    )


@cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    """Compiled when first asked for: a worker on the CPU should not load the compiler.

    Once for each power of two of sequences. Shapes that may vary would share one kernel, and how many parts a
    sequence is shared out in would then be what suits the first batch it met.
    """
    compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=False)

    def attend(*arguments: Any, **options: Any) -> Tensor:
        # Beyond eight shapes torch runs it uncompiled: all scores at once, gigabytes, and never captured. Set around
        # each call, since torch keeps what is set for each thread.
        with torch._dynamo.config.patch(recompile_limit=_MAX_COMPILED_SHAPES, fail_on_recompile_limit_hit=True):
            return compiled(*arguments, **options)

    return attend


def _split_decoding(spans: Sequence[Span]) -> tuple[Sequence[Span], Sequence[Span]]:
    """The spans before the first of several queries, and the others."""
    num = next((i for i, span in enumerate(spans) if span.num_queries > 1), len(spans))
    return spans[:num], spans[num:]


def _borders(lengths: Sequence[int], device: torch.device) -> Tensor:
    return send(np.array([0, *accumulate(lengths)], np.int32), device)
