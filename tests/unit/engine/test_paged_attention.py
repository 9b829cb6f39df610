"""Attention over scattered blocks against attention as it is written on paper."""

import math

import pytest
import torch
from torch import Tensor

from worker.engine.kv_cache import KVCache
from worker.model.configuration_keye import KeyeConfig
from worker.model.gathered_attention import GatheredForm
from worker.model.paged_attention import PagedBatch, Span

HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 4, 2, 8, 4
SCALING = HEAD_DIM**-0.5


def reference(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The last queries [n, heads, d] of a sequence over all its keys and values [m, kv_heads, d]: [n, heads, d]."""
    group = HEADS // KV_HEADS
    output = torch.empty_like(query)
    for row in range(len(query)):
        seen = len(keys) - len(query) + row + 1
        for head in range(HEADS):
            scores = keys[:seen, head // group] @ query[row, head] / math.sqrt(HEAD_DIM)
            output[row, head] = scores.softmax(dim=0) @ values[:seen, head // group]
    return output


@pytest.fixture
def cache() -> KVCache:
    config = KeyeConfig(
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        rope_parameters={"mrope_section": [1, 1, 2]},
    )
    return KVCache(config, 64, BLOCK_SIZE, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param([[5, 1, 9]], id="whole-prompts"),
        pytest.param([[3, 6], [1, 5], [4, 1]], id="prompts-in-chunks"),
        pytest.param([[5, 9, 2], [1, 1, 1], [1, 1, 1], [1, 1, 1]], id="decoding-lengths-differ"),
        pytest.param([[7, 2], [1, 1, 6], [1, 1, 3], [1, 1, 1]], id="decoding-beside-a-chunk"),
        pytest.param([[40, 38, 2, 1], [1, 1, 1, 1], [1, 1, 1, 5]], id="decoding-long-beside-short"),
    ],
)
def test_each_sequence_attends_to_itself_alone(cache: KVCache, steps: list[list[int]]) -> None:
    generator = torch.Generator().manual_seed(2)
    # Blocks of one sequence lie apart and in no order.
    blocks = torch.randperm(64, generator=generator).view(4, 16).tolist()
    keys = [torch.empty(0, KV_HEADS, HEAD_DIM) for _ in range(4)]
    values = [torch.empty(0, KV_HEADS, HEAD_DIM) for _ in range(4)]
    for step in steps:
        query, key, value = (
            torch.randn(1, heads, sum(step), HEAD_DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS)
        )
        spans, expected, start = [], [], 0
        for number, num_queries in enumerate(step):
            rows = slice(start, start + num_queries)
            start += num_queries
            keys[number] = torch.cat([keys[number], key[0, :, rows].transpose(0, 1)])
            values[number] = torch.cat([values[number], value[0, :, rows].transpose(0, 1)])
            num_keys = len(keys[number])
            spans.append(Span(blocks[number][: -(-num_keys // BLOCK_SIZE)], num_queries, num_keys))
            expected.append(reference(query[0, :, rows].transpose(0, 1), keys[number], values[number]))
        output = PagedBatch.of_spans(GatheredForm(), cache, spans).attend(1, query, key, value, SCALING)
        torch.testing.assert_close(output[0], torch.cat(expected), atol=1e-5, rtol=1e-5)
    assert not cache.keys[0].any(), "another layer's cache was written"


def test_wiped_blocks_hold_nothing_of_a_sequence_that_overflowed(cache: KVCache) -> None:
    bad = torch.full((1, KV_HEADS, 6, HEAD_DIM), torch.nan)
    PagedBatch.of_spans(GatheredForm(), cache, [Span([3, 5], 6, 6)]).attend(
        0, torch.ones(1, HEADS, 6, HEAD_DIM), bad, bad, SCALING
    )
    cache.wipe([3, 5])
    one = torch.ones(1, KV_HEADS, 1, HEAD_DIM)
    output = PagedBatch.of_spans(GatheredForm(), cache, [Span([5], 1, 1)]).attend(
        0, torch.ones(1, HEADS, 1, HEAD_DIM), one, one, SCALING
    )
    torch.testing.assert_close(output, torch.ones(1, 1, HEADS, HEAD_DIM))
