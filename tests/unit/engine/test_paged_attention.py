"""Attention over scattered blocks, in every form, against attention as it is written on paper."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from keye.worker.model import cuda_attention
from keye.worker.model.configuration_keye import KeyeConfig
from keye.worker.model.cuda_attention import FlexForm, VarlenForm
from keye.worker.model.paged_attention import AttentionForm, GatheredForm, KVCache, Span, attend_decoding, attend_spans
from tests.support.varlen_on_paper import varlen_on_paper

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


FORMS = {"gathered": GatheredForm(), "varlen": VarlenForm(64 * 256), "flex": FlexForm(64 * 128)}


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[AttentionForm]:
    """Forms for CUDA run without their kernels: FlexAttention uncompiled, `varlen_attn` as documented."""
    monkeypatch.setattr("keye.worker.model.cuda_attention.varlen_attn", varlen_on_paper)
    with torch.compiler.set_stance("force_eager"):
        yield FORMS[request.param]


class Story:
    """Four sequences that grow step by step, in blocks that lie apart and in no order."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(2)
        self._blocks = torch.randperm(64, generator=self._generator).view(4, 16).tolist()
        self._keys = [torch.empty(0, KV_HEADS, HEAD_DIM) for _ in range(4)]
        self._values = [torch.empty(0, KV_HEADS, HEAD_DIM) for _ in range(4)]

    def grow(self, num_queries: list[int]) -> tuple[list[Span], tuple[Tensor, Tensor, Tensor], Tensor]:
        """Spans, packed queries, keys and values, and the outputs [T, heads, d] as they have to be."""
        query, key, value = (
            torch.randn(1, heads, sum(num_queries), HEAD_DIM, generator=self._generator)
            for heads in (HEADS, KV_HEADS, KV_HEADS)
        )
        spans, expected, start = [], [], 0
        for number, num in enumerate(num_queries):
            rows = slice(start, start + num)
            start += num
            self._keys[number] = torch.cat([self._keys[number], key[0, :, rows].transpose(0, 1)])
            self._values[number] = torch.cat([self._values[number], value[0, :, rows].transpose(0, 1)])
            keys, values = self._keys[number], self._values[number]
            spans.append(Span(self._blocks[number][: -(-len(keys) // BLOCK_SIZE)], num, len(keys)))
            expected.append(reference(query[0, :, rows].transpose(0, 1), keys, values))
        return spans, (query, key, value), torch.cat(expected)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
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
def test_each_sequence_attends_to_itself_alone(form: AttentionForm, cache: KVCache, steps: list[list[int]]) -> None:
    story = Story()
    for step in steps:
        spans, packed, expected = story.grow(step)
        output = attend_spans(form, cache, spans)(1, *packed, SCALING)
        torch.testing.assert_close(output[0], expected, atol=1e-5, rtol=1e-5)
    assert not cache.keys[0].any(), "another layer's cache was written"


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_decoding_from_tensors_alone_attends_the_same(form: AttentionForm, cache: KVCache) -> None:
    story = Story()
    spans, packed, _ = story.grow([7, 40, 3, 1])
    attend_spans(form, cache, spans)(1, *packed, SCALING)
    for _ in range(3):
        spans, packed, expected = story.grow([1, 1, 1, 1])
        # Wider than needed, and with a row that only fills the batch up.
        tables = torch.full((5, 16), cache.scratch_block, dtype=torch.int32)
        for row, span in enumerate(spans):
            tables[row, : len(span.block_table)] = torch.tensor(span.block_table)
        lengths = torch.tensor([*(span.num_keys for span in spans), 1], dtype=torch.int32)
        filled: Any = (torch.cat([x, torch.ones_like(x[:, :, :1])], dim=2) for x in packed)
        output = attend_decoding(form, cache, tables, lengths)(1, *filled, SCALING)
        torch.testing.assert_close(output[0, :4], expected, atol=1e-5, rtol=1e-5)


def test_wiped_blocks_hold_nothing_of_a_sequence_that_overflowed(cache: KVCache) -> None:
    bad = torch.full((1, KV_HEADS, 6, HEAD_DIM), torch.nan)
    attend_spans(GatheredForm(), cache, [Span([3, 5], 6, 6)])(0, torch.ones(1, HEADS, 6, HEAD_DIM), bad, bad, SCALING)
    cache.wipe([3, 5])
    one = torch.ones(1, KV_HEADS, 1, HEAD_DIM)
    output = attend_spans(GatheredForm(), cache, [Span([5], 1, 1)])(
        0, torch.ones(1, HEADS, 1, HEAD_DIM), one, one, SCALING
    )
    torch.testing.assert_close(output, torch.ones(1, 1, HEADS, HEAD_DIM))


def test_a_cache_takes_memory_on_a_cpu_only_where_it_is_written_to() -> None:
    config = KeyeConfig(num_hidden_layers=1, num_key_value_heads=8, head_dim=128)
    before = _anonymous_bytes()
    cache = KVCache(config, 2**12, 16, torch.bfloat16, torch.device("cpu"))  # 256 MiB
    assert not cache.keys[0][[0, -1]].any()
    cache.keys[0][:16] = 1  # 0.5 MiB
    assert _anonymous_bytes() - before < 2**25


def _anonymous_bytes() -> int:
    return 1024 * int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])


def test_flex_attention_stays_compiled_for_however_many_shapes(cache: KVCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an H100 the engine's caches after the trial's made more shapes than the eight that torch compiles.

    The compiler itself works here as it does there; what makes the kernels is replaced.
    """
    num_compiled = 0

    def count(graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., Any]:
        nonlocal num_compiled
        num_compiled += 1
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=count))
    compiled = cuda_attention._compiled_flex_attention.__wrapped__()
    monkeypatch.setattr(cuda_attention, "_compiled_flex_attention", lambda: compiled)
    form = FlexForm(16 * BLOCK_SIZE)
    generator = torch.Generator().manual_seed(0)
    for num in range(1, 12):
        tables = torch.randint(64, (num, 16), dtype=torch.int32, generator=generator)
        call = form.decoding(cache, tables, torch.full((num,), 9, dtype=torch.int32))
        query = torch.randn(num, HEADS, HEAD_DIM, generator=generator)
        assert call.attend(query, cache.keys[0], cache.values[0], SCALING).shape == query.shape
        assert num_compiled == num
