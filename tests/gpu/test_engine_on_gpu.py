"""The engine on a GPU: its attention forms, captured steps and cache size. Skipped where torch sees none."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle

import pytest
import torch

from keye.worker.engine.inbox import SamplingOptions
from keye.worker.engine.memory import measure_cache_bytes
from keye.worker.engine.step_loop import DEFAULT_LIMITS, Engine
from keye.worker.engine.step_plan import StepLimits
from keye.worker.model.attention_choice import _fault, _Trial, choose_attention
from keye.worker.model.configuration_keye import KeyeConfig
from keye.worker.model.cuda_attention import HAS_BLOCK_TABLES, FlexForm, VarlenForm
from keye.worker.model.image_processing import ImageProcessor
from keye.worker.model.item_attention import EqualItems, ItemForm, VarlenItems
from keye.worker.model.load import load_model
from keye.worker.model.paged_attention import AttentionForm
from keye.worker.model.processor import KeyeProcessor, PreparedPrompt
from keye.worker.proof.golden_case import GENERATIONS
from keye.worker.proof.numbers import prove_numbers

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    # Each version of torch's compiler warns of something else, and none of it is ours.
    pytest.mark.filterwarnings("default"),
]

CHECKPOINT = GENERATIONS["Keye"] / "checkpoint"

FORMS = [
    pytest.param(
        lambda: VarlenForm(40960),
        id="varlen",
        marks=pytest.mark.skipif(not HAS_BLOCK_TABLES, reason="varlen_attn has block tables from torch 2.12 on"),
    ),
    pytest.param(lambda: FlexForm(40960), id="flex"),
]


@pytest.mark.parametrize("make_form", FORMS)
@torch.inference_mode()
def test_kernels_attend_as_written_out_in_float32(make_form: Callable[[], AttentionForm]) -> None:
    trial = _Trial(KeyeConfig(), torch.bfloat16, torch.device("cuda"))
    assert [fault for fault in map(_fault, trial.paged_steps(make_form())) if fault] == []


@pytest.mark.parametrize("form", [VarlenItems(), EqualItems()], ids=lambda form: form.name)
@torch.inference_mode()
def test_images_attend_as_written_out_in_float32(form: ItemForm) -> None:
    trial = _Trial(KeyeConfig(), torch.bfloat16, torch.device("cuda"))
    assert [fault for fault in map(_fault, trial.items(form)) if fault] == []


def test_the_device_gets_the_fastest_form() -> None:
    attention = choose_attention(KeyeConfig(), torch.bfloat16, torch.device("cuda"))
    assert attention.refused == ()
    assert isinstance(attention.paged, VarlenForm if HAS_BLOCK_TABLES else FlexForm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_are_the_reference_ones(dtype: torch.dtype) -> None:
    print(prove_numbers(GENERATIONS.values(), dtype, torch.device("cuda")))


def test_patches_are_normalised_to_the_numbers_of_the_cpu_to_the_bit() -> None:
    images = ImageProcessor.from_checkpoint(CHECKPOINT)
    levels = torch.arange(256, dtype=torch.uint8).repeat_interleave(3).view(256, 3, 1, 1)
    for image_std in (images.image_std, (0.26862954, 0.26130258, 0.27577711)):
        rule = replace(images, image_std=image_std)
        assert torch.equal(rule.normalise(levels.cuda()).cpu(), rule.normalise(levels))


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
