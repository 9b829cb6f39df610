"""What the engine asks of a GPU, on a pretended one: nothing that a GPU refuses, and one wait a step."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.pretended_cuda import PretendedCuda, RefusedByDevice, Tally, pretended_cuda
from benchmarks.synthetic_keye import Size, make_model, make_processor, tiny_size
from benchmarks.synthetic_keye import make_prompt as make_image_prompt
from keye.worker.engine import step_loop
from keye.worker.engine.inbox import PendingGeneration, SamplingOptions
from keye.worker.engine.memory import block_bytes
from keye.worker.engine.step_loop import Engine
from keye.worker.engine.step_plan import StepLimits
from keye.worker.model import cuda_attention
from keye.worker.model.attention_choice import Attention, choose_attention
from keye.worker.model.configuration_keye import KeyeConfig, KeyeVisionConfig, KeyeVL1_5Config
from keye.worker.model.cuda_attention import HAS_BLOCK_TABLES, FlexForm, VarlenForm
from keye.worker.model.item_attention import EqualItems, VarlenItems
from keye.worker.model.paged_attention import AttentionForm, GatheredForm, KVCache, Span, attend_spans
from keye.worker.model.positions import position_ids
from keye.worker.model.processor import PreparedPrompt

MAX_TOKENS = 2048
LIMITS = StepLimits(max_running=4, max_step_tokens=128)
GREEDY = SamplingOptions(3)
SAMPLED = replace(GREEDY, temperature=0.6, top_p=0.95, top_k=20, seed=7)
PENALISED = replace(SAMPLED, repetition_penalty=1.05)

MakePrompt = Callable[[list[int]], PreparedPrompt]
MakeEngine = Callable[..., Engine]

needs_block_tables = pytest.mark.skipif(
    not HAS_BLOCK_TABLES, reason="varlen_attn has no block tables before torch 2.12"
)
varlen = pytest.param(partial(VarlenForm, MAX_TOKENS), id="varlen", marks=needs_block_tables)
flex = pytest.param(partial(FlexForm, MAX_TOKENS), id="flex")
gathered = pytest.param(GatheredForm, id="gathered")


def two_layers(config_class: type[KeyeConfig] = KeyeConfig) -> Size:
    """All else as in the 8B models: pretended weights take no memory."""
    config = config_class(num_hidden_layers=2, vision_config=KeyeVisionConfig(num_hidden_layers=2))
    return replace(tiny_size(), config=config, dtype=torch.bfloat16)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedCuda]:
    def compiled(query: Tensor, *_: Tensor, **__: Any) -> Tensor:
        return torch.empty_like(query)

    # There is nothing to compile for, and the compiler takes half a minute.
    monkeypatch.setattr(cuda_attention, "_compiled_flex_attention", lambda: compiled)
    with pretended_cuda() as cuda:
        yield cuda


@pytest.fixture
def make_engine(cuda: PretendedCuda, monkeypatch: pytest.MonkeyPatch) -> MakeEngine:
    def make(make_form: Callable[[], AttentionForm], size: Size | None = None, num_tokens: int = 32768) -> Engine:
        size, form = size or two_layers(), make_form()
        items = EqualItems() if isinstance(form, GatheredForm) else VarlenItems()
        monkeypatch.setattr(step_loop, "choose_attention", lambda *_: Attention(form, items, ()))
        return Engine(
            make_model(size, torch.device("cuda")),
            make_processor(size),
            kv_cache_bytes=num_tokens * block_bytes(size.config, 1, size.dtype),
            limits=LIMITS,
        )

    return make


def step_until_idle(engine: Engine, cuda: PretendedCuda, pendings: list[PendingGeneration]) -> list[Tally]:
    """What each step did. A job that failed raises."""
    tallies = []
    while not all(pending.has_ended for pending in pendings):
        with cuda.counting() as tally:
            engine._step()
        tallies.append(tally)
    for pending in pendings:
        list(pending.deltas())
    return tallies


def waits_beside_reading_tokens(tallies: list[Tally]) -> list[str]:
    """What waits in any step, but for one reading by the sampler in each."""
    others = []
    for tally in tallies:
        readings = [wait for wait in tally.waits if wait.startswith("reads") and "engine/sampler.py" in wait]
        others += [wait for wait in tally.waits if wait not in readings[:1]] + readings[1:]
    return others


@pytest.mark.parametrize("make_form", [varlen, flex])
def test_captured_step_neither_waits_nor_reads_from_the_host(
    cuda: PretendedCuda, make_engine: MakeEngine, make_form: Callable[[], AttentionForm]
) -> None:
    engine = make_engine(make_form)
    engine._runner.capture_decoding(LIMITS.max_running)
    num_sizes = 3
    assert len(cuda.recordings) == num_sizes * len(make_form().table_widths)
    assert [tally.copies + tally.waits for tally in cuda.recordings] == [[]] * len(cuda.recordings)


@pytest.mark.parametrize("make_form", [varlen, flex, gathered])
def test_step_waits_for_its_tokens_and_for_nothing_else(
    cuda: PretendedCuda,
    make_engine: MakeEngine,
    make_prompt: MakePrompt,
    make_form: Callable[[], AttentionForm],
) -> None:
    """Prompts in chunks, beside others that decode, and batches that change as jobs come and end."""
    engine = make_engine(make_form)
    engine._runner.capture_decoding(LIMITS.max_running)
    engine._processor.eos_token_ids = (503,)
    reported = replace(PENALISED, min_tokens=3, logprobs=True)
    options = [GREEDY, PENALISED, SAMPLED, replace(SAMPLED, top_k=5), reported, PENALISED, replace(reported, seed=8)]
    pendings = [
        engine.inbox.submit(make_prompt([n] * (20 + 50 * n)), replace(option, max_new_tokens=3 + n))
        for n, option in enumerate(options)
    ]
    tallies = step_until_idle(engine, cuda, pendings)
    assert waits_beside_reading_tokens(tallies) == []


@pytest.mark.parametrize(
    ("make_form", "config_class"),
    [
        pytest.param(partial(VarlenForm, MAX_TOKENS), KeyeConfig, id="varlen", marks=needs_block_tables),
        pytest.param(partial(FlexForm, MAX_TOKENS), KeyeVL1_5Config, id="flex-1.5"),
        pytest.param(GatheredForm, KeyeConfig, id="gathered"),
        pytest.param(GatheredForm, KeyeVL1_5Config, id="gathered-1.5"),
    ],
)
def test_images_and_videos_are_encoded_without_a_wait(
    cuda: PretendedCuda,
    make_engine: MakeEngine,
    make_form: Callable[[], AttentionForm],
    config_class: type[KeyeConfig],
) -> None:
    size = two_layers(config_class)
    engine = make_engine(make_form, size)
    prompts = [make_image_prompt(size, seed=0), make_image_prompt(replace(size, grid=(4, 12)), seed=1)]
    pendings = [engine.inbox.submit(prompt, GREEDY) for prompt in [*prompts, make_video_prompt(size.config)]]
    tallies = step_until_idle(engine, cuda, pendings)
    assert tallies[0].operations["gelu"] > 0
    assert waits_beside_reading_tokens(tallies) == []


@pytest.mark.parametrize("make_form", [varlen, flex, gathered])
def test_preempted_job_makes_nobody_wait(
    cuda: PretendedCuda, make_engine: MakeEngine, make_prompt: MakePrompt, make_form: Callable[[], AttentionForm]
) -> None:
    block_size = make_form().block_size
    engine = make_engine(make_form, num_tokens=3 * block_size)
    prompt = make_prompt([1] * (block_size - 2))
    pendings = [engine.inbox.submit(prompt, replace(PENALISED, max_new_tokens=6)) for _ in range(2)]
    tallies = step_until_idle(engine, cuda, pendings)
    assert engine.snapshot().preemptions > 0
    assert waits_beside_reading_tokens(tallies) == []


def test_what_is_around_a_captured_step_is_the_same_for_one_job_and_for_many(
    cuda: PretendedCuda, make_engine: MakeEngine, make_prompt: MakePrompt
) -> None:
    engine = make_engine(partial(FlexForm, MAX_TOKENS))
    engine._runner.capture_decoding(LIMITS.max_running)
    for options in (GREEDY, SAMPLED, PENALISED):
        around = []
        for num in (1, 4):
            pendings = [engine.inbox.submit(make_prompt([1, 2, 3]), options) for _ in range(num)]
            last = step_until_idle(engine, cuda, pendings)[-1]
            around.append((last.operations, len(last.copies)))
        assert around[0] == around[1]


def test_forms_of_attention_are_tried_on_the_device_itself(cuda: PretendedCuda) -> None:
    attention = choose_attention(two_layers().config, torch.bfloat16, torch.device("cuda"))
    assert attention.refused == ()
    assert attention.items.name == VarlenItems.name


# The shapes of the 8B models: 32 heads of 128, 8 of keys.
A_FEW_OVER_MANY, ALL_OVER_THEIRS = Span([0, 1, 2, 3, 4, 5], 30, 1400), Span([6], 60, 60)


@needs_block_tables
@pytest.mark.parametrize(
    "spans",
    [[A_FEW_OVER_MANY, ALL_OVER_THEIRS], [Span([7], 1, 200), Span([8], 1, 9), A_FEW_OVER_MANY, ALL_OVER_THEIRS]],
    ids=["prompts", "prompts-beside-decoding"],
)
def test_prompts_that_share_a_call_are_all_written(cuda: PretendedCuda, spans: list[Span]) -> None:
    config = two_layers().config
    cache = KVCache(config, 16, VarlenForm.block_size, torch.bfloat16, torch.device("cuda"))
    num = sum(span.num_queries for span in spans)
    query, key, value = (
        torch.empty(1, heads, num, config.head_dim, dtype=torch.bfloat16, device="cuda")
        for heads in (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    )
    output = attend_spans(VarlenForm(MAX_TOKENS), cache, spans)(0, query, key, value, scaling=0.1)
    assert output.shape == (1, num, config.num_attention_heads, config.head_dim)


def test_pretended_gpu_refuses_what_a_gpu_refuses(cuda: PretendedCuda) -> None:
    there, here = torch.ones(3, device="cuda"), torch.ones(3)
    assert (there + torch.tensor(2.0)).device.type == "cuda"
    with pytest.raises(RefusedByDevice, match="tensor of the host"):
        there.add(here)
    all_wait: list[Callable[[], Any]] = [
        there.tolist,
        there.cpu,
        there.sum().item,
        lambda: here.copy_(there),
        lambda: there[here.long()],
        lambda: here.to("cuda", non_blocking=True),
    ]
    for waits in all_wait:
        with cuda.counting() as tally:
            waits()
        assert len(tally.waits) == 1
        with pytest.raises(RefusedByDevice, match="while a step is captured"):
            cuda.record(waits)


def make_video_prompt(config: KeyeConfig) -> PreparedPrompt:
    """Two frames: one item in Preview, an item each in 1.5."""
    grid, num_items = (2, 8, 8), 2 if config.splits_video_into_frames else 1
    rows = torch.full((2 * 16 // num_items,), config.video_token_id)
    word = torch.ones(3, dtype=torch.long)
    input_ids = torch.cat([torch.cat([word, rows])] * num_items + [word])
    positions, delta = position_ids(input_ids, config, video_grids=[grid])
    return PreparedPrompt(
        text="",
        input_ids=input_ids,
        position_ids=positions,
        rope_delta=delta,
        num_visual_tokens=32,
        pixel_values_videos=torch.zeros(2 * 64, 3, 14, 14, dtype=torch.uint8),
        video_grid_thw=torch.tensor([grid]),
    )
