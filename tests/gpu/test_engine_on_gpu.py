"""The engine on a GPU: its attention forms, captured steps and cache size. Skipped where torch sees none."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import pytest
import torch

from keye.worker.engine.inbox import SamplingOptions
from keye.worker.engine.memory import measure_cache_bytes
from keye.worker.engine.step_loop import DEFAULT_LIMITS, Engine
from keye.worker.engine.step_plan import StepLimits
from keye.worker.model.configuration_keye import KeyeConfig
from keye.worker.model.cuda_attention import HAS_BLOCK_TABLES, FlexForm, VarlenForm
from keye.worker.model.load import load_model
from keye.worker.model.paged_attention import AttentionForm, GatheredForm, KVCache, Span, attend_spans
from keye.worker.model.processor import KeyeProcessor, PreparedPrompt

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    # Each version of torch's compiler warns of something else, and none of it is ours.
    pytest.mark.filterwarnings("default"),
]

CHECKPOINT = Path(__file__).parents[1] / "golden" / "preview" / "checkpoint"
HEADS, KV_HEADS, HEAD_DIM, NUM_BLOCKS = 32, 8, 128, 24

FORMS = [
    pytest.param(
        lambda: VarlenForm(4096),
        id="varlen",
        marks=pytest.mark.skipif(not HAS_BLOCK_TABLES, reason="varlen_attn has block tables from torch 2.12 on"),
    ),
    pytest.param(lambda: FlexForm(4096), id="flex"),
]


def shapes_of_the_8b_model() -> KeyeConfig:
    return KeyeConfig(num_hidden_layers=1, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM)


@pytest.mark.parametrize("make_form", FORMS)
@pytest.mark.parametrize(
    "num_queries",
    [[700, 30, 256], [1, 1, 1, 1, 1], [1], [1, 1, 400, 3]],
    ids=["prompts", "decoding", "one-decoding", "decoding-beside-prompts"],
)
@torch.inference_mode()
def test_kernels_attend_as_gathered_blocks_do(make_form: Callable[[], AttentionForm], num_queries: list[int]) -> None:
    form, device = make_form(), torch.device("cuda")
    cache = KVCache(shapes_of_the_8b_model(), NUM_BLOCKS, form.block_size, torch.bfloat16, device)
    torch.manual_seed(0)
    for paged in (*cache.keys, *cache.values):
        paged.normal_()
    free = torch.randperm(NUM_BLOCKS).tolist()
    spans = []
    for number, num in enumerate(num_queries):
        num_keys = num + 37 * number + 11
        spans.append(Span([free.pop() for _ in range(-(-num_keys // form.block_size))], num, num_keys))
    query, key, value = (
        torch.randn(1, heads, sum(num_queries), HEAD_DIM, dtype=torch.bfloat16, device=device)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    outputs = [
        attend_spans(each, cache, spans)(0, query, key, value, HEAD_DIM**-0.5) for each in (form, GatheredForm())
    ]
    torch.testing.assert_close(outputs[0], outputs[1], atol=2e-2, rtol=2e-2)


GREEDY = SamplingOptions(40)


def written_tokens(
    engine: Engine, prompts: list[PreparedPrompt], options: Sequence[SamplingOptions] = (GREEDY,)
) -> list[tuple[int, ...]]:
    """All prompts at once, with the options in turn."""
    pendings = [engine.inbox.submit(prompt, own) for prompt, own in zip(prompts, cycle(options), strict=False)]
    for pending in pendings:
        list(pending.deltas())
    return [pending.generated.token_ids for pending in pendings]


def make_prompts(processor: KeyeProcessor) -> list[PreparedPrompt]:
    texts = ["What is this? " * n for n in (1, 4, 9, 20, 2)]
    return [processor.prepare([{"role": "user", "content": text}]) for text in texts]


def test_captured_steps_write_what_uncaptured_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of it: half precision may round one step otherwise, and a sequence that has turned off stays so."""
    processor = KeyeProcessor.from_checkpoint(CHECKPOINT)
    written = []
    for is_captured in (True, False):
        model = load_model(CHECKPOINT, dtype=torch.bfloat16, device="cuda")
        engine = Engine(model, processor, kv_cache_bytes=2**26, limits=StepLimits(max_running=8))
        if not is_captured:
            monkeypatch.setattr(engine._runner, "capture_decoding", lambda max_running: None)
        engine.start()
        written.append(written_tokens(engine, make_prompts(processor)))
        assert bool(engine._runner._graphs) == is_captured
        engine.stop()
    same = [sum(a == b for a, b in zip(*pair, strict=True)) / len(pair[0]) for pair in zip(*written, strict=True)]
    assert sum(share > 0.9 for share in same) >= len(same) - 1, same


def test_measured_cache_leaves_the_rest_of_the_memory_alone() -> None:
    processor = KeyeProcessor.from_checkpoint(CHECKPOINT)
    model = load_model(CHECKPOINT, dtype=torch.bfloat16, device="cuda")
    torch.cuda.empty_cache()  # of what earlier tests took
    free, total = torch.cuda.mem_get_info()
    measured = measure_cache_bytes(model, processor, DEFAULT_LIMITS, memory_fraction=0.5)
    assert 0 < measured < total // 2 - (total - free)


def test_float32_on_a_gpu_writes_what_it_does_on_the_cpu_greedy_and_sampled() -> None:
    processor = KeyeProcessor.from_checkpoint(CHECKPOINT)
    sampled = replace(GREEDY, temperature=0.7, top_p=0.9, top_k=20, repetition_penalty=1.1, seed=5)
    written: list[list[tuple[int, ...]]] = []
    for device in ("cpu", "cuda"):
        model = load_model(CHECKPOINT, dtype=torch.float32, device=device)
        engine = Engine(model, processor, kv_cache_bytes=2**26)
        engine.start()
        written.append(written_tokens(engine, make_prompts(processor), [GREEDY, sampled]))
        engine.stop()
    assert written[0] == written[1]
