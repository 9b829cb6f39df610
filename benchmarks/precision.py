"""What each precision costs and gives: right answers, bytes of weights, tokens a second through the engine."""

import statistics
import time
from collections.abc import Sequence

import torch

from keye.config.codes import PrecisionSetting
from keye.worker.daemon.bench import anew
from keye.worker.demo.local_worker import SMALL_KEYE
from keye.worker.engine.inbox import SamplingOptions
from keye.worker.engine.step_loop import Engine
from keye.worker.model.load import load_model
from keye.worker.model.precision import choose_precision
from keye.worker.model.processor import KeyeProcessor, PreparedPrompt
from tools.small_keye.evaluate import Exam, draw_exams, evaluate, share_right

PRECISIONS: tuple[PrecisionSetting, ...] = ("float32", "bfloat16", "int8", "int4")
NUM_SCENES = 200
FIRST_SEED = 5_000_000
NUM_TOGETHER = 16
ROUNDS = 5
_GREEDY = SamplingOptions(96)


def run() -> str:
    processor = KeyeProcessor.from_checkpoint(SMALL_KEYE)
    exams = [exam for seed in range(FIRST_SEED, FIRST_SEED + NUM_TOGETHER) for exam in draw_exams(seed)]
    prompts = [_prepare(processor, exam) for exam in exams if exam.thinking == "think"]
    rows = [_measure(precision, processor, prompts) for precision in PRECISIONS]
    lines = [
        f"The small Keye on the CPU; answers to {NUM_SCENES} scenes, speeds are medians of {ROUNDS} rounds.",
        "",
        f"| precision | right answers | weights | tokens/s, one job | tokens/s, {NUM_TOGETHER} jobs |",
        "|---|---|---|---|---|",
        *rows,
    ]
    return "\n".join(lines) + "\n"


def _measure(precision: PrecisionSetting, processor: KeyeProcessor, prompts: Sequence[PreparedPrompt]) -> str:
    chosen = choose_precision(precision, torch.device("cpu"))
    model = load_model(SMALL_KEYE, dtype=chosen.dtype, quantization=chosen.quantization)
    weights = sum(_num_bytes(parameter) for parameter in model.parameters())
    engine = Engine(model, processor, kv_cache_bytes=2**28)
    engine.start()
    try:
        engine.warm_up()
        alone = statistics.median(_tokens_per_second(engine, prompts[:1]) for _ in range(ROUNDS))
        together = statistics.median(_tokens_per_second(engine, prompts) for _ in range(ROUNDS))
    finally:
        engine.stop()
    right = share_right(evaluate(SMALL_KEYE, NUM_SCENES, FIRST_SEED, precision))
    return f"| {precision} | {right:.1%} | {weights / 1e6:.1f} MB | {alone:.0f} | {together:.0f} |"


def _prepare(processor: KeyeProcessor, exam: Exam) -> PreparedPrompt:
    media = [{"type": "image"} for _ in exam.images] + [{"type": "video"} for _ in exam.videos]
    content = [*media, {"type": "text", "text": exam.question.text}]
    return processor.prepare([{"role": "user", "content": content}], exam.images, exam.videos, exam.thinking)


def _tokens_per_second(engine: Engine, prompts: Sequence[PreparedPrompt]) -> float:
    began = time.perf_counter()
    pendings = [engine.inbox.submit(anew(prompt), _GREEDY) for prompt in prompts]
    for pending in pendings:
        for _ in pending.deltas():
            pass
    return sum(len(pending.generated.token_ids) for pending in pendings) / (time.perf_counter() - began)


def _num_bytes(weight: torch.Tensor) -> int:
    """Of a quantised weight its numbers and their scales, whichever library holds them."""
    if hasattr(weight, "__tensor_flatten__"):
        names, _ = weight.__tensor_flatten__()
        return sum(_num_bytes(getattr(weight, name)) for name in names)
    scales = getattr(weight, "quant_state", None)
    return weight.nbytes + (scales.absmax.nbytes if scales is not None else 0)
