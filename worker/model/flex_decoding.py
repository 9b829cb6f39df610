"""Paged attention for CUDA where `varlen_attn` has no block tables yet: FlexAttention decodes over the blocks."""

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from keye.worker.model.paged_attention import AttentionCall, PagedCache, Span, as_table
from keye.worker.model.varlen_attention import GatheredPrompts, split_decoding


@cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    """Compiled when first asked for: a worker on the CPU should not load the compiler.

    Once for each power of two of sequences. Shapes that may vary would share one kernel, and how many parts a
    sequence is shared out in would then be what suits the first batch it met.
    """
    compiled: Callable[..., Tensor] = torch.compile(flex_attention, dynamic=False)
    return compiled


class FlexForm:
    """Decoding sequences share one call, padded to a power of two of them; prompts share another."""

    name = "flex_attention over blocks, varlen_attn for prompts"
    block_size = 128

    def __init__(self, max_tokens: int) -> None:
        self.table_widths: Sequence[int] = (-(-max_tokens // self.block_size),)

    def calls(self, cache: PagedCache, spans: Sequence[Span]) -> list[AttentionCall]:
        decoding, prompts = split_decoding(spans)
        calls = [self._padded(cache, decoding)] if decoding else []
        return [*calls, GatheredPrompts(cache, prompts)] if prompts else calls

    def decoding(self, cache: PagedCache, block_tables: Tensor, lengths: Tensor) -> AttentionCall:
        return _Decoding(cache, block_tables, lengths, len(lengths))

    def _padded(self, cache: PagedCache, spans: Sequence[Span]) -> AttentionCall:
        device = cache.keys[0].device
        num_nobodys = (1 << (len(spans) - 1).bit_length()) - len(spans)
        rows = [*spans, *[Span([], 1, 1)] * num_nobodys]
        tables = torch.from_numpy(as_table(rows, self.table_widths[0], cache.scratch_block)).to(device)
        lengths = torch.tensor([row.num_keys for row in rows], dtype=torch.int32, device=device)
        return _Decoding(cache, tables, lengths, len(spans))


class _Decoding:
    """One query each of the first `num_queries` of n sequences: tables int32 [n, width], lengths int32 [n]."""

    def __init__(self, cache: PagedCache, block_tables: Tensor, lengths: Tensor, num_queries: int) -> None:
        self.num_queries = num_queries
        self._num_nobodys = len(lengths) - num_queries
        self._mask = _block_mask(block_tables, lengths, cache)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        # The whole cache is one long sequence of keys [1, kv_heads, slots, d], of which the mask shows each its own.
        key, value = (paged.flatten(0, 1).transpose(0, 1).unsqueeze(0) for paged in (keys, values))
        # Contiguous, because other strides would be compiled for anew.
        padded = torch.nn.functional.pad(query, (0, 0, 0, 0, 0, self._num_nobodys)).contiguous()
        attend = _compiled_flex_attention()
        output = attend(padded.unsqueeze(2), key, value, block_mask=self._mask, scale=scaling, enable_gqa=True)
        return output[: self.num_queries].squeeze(2)


def _block_mask(block_tables: Tensor, lengths: Tensor, cache: PagedCache) -> BlockMask:
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
