"""Quantised, the small Keye answers as well as in float32, through `generate` and through the engine."""

from collections.abc import Sequence

import pytest
import torch

from keye.config.codes import PrecisionSetting
from keye.worker.demo.local_worker import SMALL_KEYE
from keye.worker.engine.inbox import SamplingOptions
from keye.worker.engine.step_loop import Engine
from keye.worker.model.load import load_model
from keye.worker.model.precision import choose_precision
from keye.worker.model.processor import KeyeProcessor, PreparedPrompt
from tools.small_keye.evaluate import Exam, draw_exams, evaluate, share_right

NUM_SCENES = 80
FIRST_SEED = 5_000_000


@pytest.fixture(scope="module")
def share_in_float32() -> float:
    return share_right(evaluate(SMALL_KEYE, NUM_SCENES, FIRST_SEED))


@pytest.mark.parametrize(("precision", "points"), [("int8", 0.02), ("int4", 0.05)])
def test_quantised_small_keye_keeps_its_accuracy(
    precision: PrecisionSetting, points: float, share_in_float32: float
) -> None:
    assert share_right(evaluate(SMALL_KEYE, NUM_SCENES, FIRST_SEED, precision)) >= share_in_float32 - points


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_engine_says_what_generate_says(precision: PrecisionSetting) -> None:
    chosen = choose_precision(precision, torch.device("cpu"))
    processor = KeyeProcessor.from_checkpoint(SMALL_KEYE)
    prompts = [_prepare(processor, exam) for seed in range(4) for exam in draw_exams(FIRST_SEED + seed)]
    plain = load_model(SMALL_KEYE, dtype=chosen.dtype, quantization=chosen.quantization)
    expected = []
    for prompt in prompts:
        batch = processor.pad_left([prompt])
        tokens = plain.generate(**batch, do_sample=False, max_new_tokens=96)[0, batch["input_ids"].shape[1] :]
        expected.append(processor.tokenizer.decode(tokens, skip_special_tokens=True))
    engine = Engine(
        load_model(SMALL_KEYE, dtype=chosen.dtype, quantization=chosen.quantization), processor, kv_cache_bytes=2**27
    )
    engine.start()
    try:
        assert _answers(engine, prompts) == expected
    finally:
        engine.stop()


def _prepare(processor: KeyeProcessor, exam: Exam) -> PreparedPrompt:
    media = [{"type": "image"} for _ in exam.images] + [{"type": "video"} for _ in exam.videos]
    content = [*media, {"type": "text", "text": exam.question.text}]
    return processor.prepare([{"role": "user", "content": content}], exam.images, exam.videos, exam.thinking)


def _answers(engine: Engine, prompts: Sequence[PreparedPrompt]) -> list[str]:
    greedy = SamplingOptions(96)
    pendings = [engine.inbox.submit(prompt, greedy) for prompt in prompts]
    return ["".join(delta.text for delta in pending.deltas()) for pending in pendings]
