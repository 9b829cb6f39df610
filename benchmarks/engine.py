"""The engine against `generate`: one job at a time, and static batches that end with their longest answer."""

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch

from keye.worker.daemon.bench import anew, check_agreement
from keye.worker.demo.local_worker import SMALL_KEYE
from keye.worker.demo.scenes import draw_image_scene
from keye.worker.engine.inbox import PendingGeneration, SamplingOptions
from keye.worker.engine.step_loop import Engine
from keye.worker.model.image_processing import Image
from keye.worker.model.keye import KeyeForConditionalGeneration
from keye.worker.model.load import load_model
from keye.worker.model.processor import KeyeProcessor, PreparedPrompt

ROUNDS = 3
GREEDY = SamplingOptions(1)
SAMPLED = replace(GREEDY, temperature=0.6, top_p=0.95, top_k=20, seed=7)


def run() -> str:
    num_threads = torch.get_num_threads()
    # What a worker has on two cores, and where all ways are fastest: threads of so small a model wait for each other.
    torch.set_num_threads(1)
    try:
        return _report()
    finally:
        torch.set_num_threads(num_threads)


def _report() -> str:
    processor = KeyeProcessor.from_checkpoint(SMALL_KEYE)
    processor.eos_token_ids = ()  # answers are as long as they are asked to be
    plain = load_model(SMALL_KEYE, dtype=torch.float32)
    engine = Engine(load_model(SMALL_KEYE, dtype=torch.float32), processor, kv_cache_bytes=2**28)
    engine.start()
    try:
        prompts = [_prompt(processor, seed) for seed in range(64)]
        lengths = [random.Random(seed).randint(8, 256) for seed in range(64)]
        check_agreement(engine, plain, prompts[0], max(lengths))
        lines = [
            f"Small Keye in float32, one torch thread; medians of {ROUNDS} rounds.",
            "",
            *_throughput(engine, plain, processor, prompts, lengths),
            "",
            *_latency(engine, prompts),
            "",
            *_overhead(engine, prompts),
        ]
    finally:
        engine.stop()
    return "\n".join(lines) + "\n"


def _throughput(
    engine: Engine,
    plain: KeyeForConditionalGeneration,
    processor: KeyeProcessor,
    prompts: list[PreparedPrompt],
    lengths: list[int],
) -> Iterator[str]:
    def by_engine() -> None:
        jobs = zip(prompts, lengths, strict=True)
        _read([engine.inbox.submit(anew(prompt), replace(GREEDY, max_new_tokens=new)) for prompt, new in jobs])

    def one_by_one() -> None:
        for prompt, new in zip(prompts, lengths, strict=True):
            _generate(plain, processor, [prompt], new)

    def in_batches() -> None:
        for at in range(0, len(prompts), 8):
            _generate(plain, processor, prompts[at : at + 8], max(lengths[at : at + 8]))

    ways = {
        "`generate`, one job at a time": one_by_one,
        "`generate`, static batches of 8": in_batches,
        "engine": by_engine,
    }
    rounds = [[_seconds(way) for way in ways.values()] for _ in range(ROUNDS)]
    yield f"| 64 image jobs of 8 to 256 new tokens ({sum(lengths)} in all) | jobs/s | engine is faster by |"
    yield "|---|---|---|"
    for column, name in enumerate(ways):
        speed = statistics.median(len(prompts) / seconds[column] for seconds in rounds)
        ratio = statistics.median(seconds[column] / seconds[-1] for seconds in rounds)
        yield f"| {name} | {speed:.1f} | {ratio:.2f} |"


def _latency(engine: Engine, prompts: list[PreparedPrompt]) -> Iterator[str]:
    short, long = replace(GREEDY, max_new_tokens=16), replace(GREEDY, max_new_tokens=512)
    idle = [_seconds(lambda: _read([engine.inbox.submit(anew(prompts[0]), short)])) for _ in range(10 * ROUNDS)]
    beside = []
    for _ in range(ROUNDS):
        busy = [engine.inbox.submit(anew(prompt), long) for prompt in prompts[1:9]]
        for pending in busy:
            next(pending.deltas())
        beside.append(_seconds(lambda: _read([engine.inbox.submit(anew(prompts[0]), short)])))
        assert not any(pending.has_ended for pending in busy), "the long jobs ended first"
        _read(busy)
    yield "| a job of 16 new tokens | ms | ratio |"
    yield "|---|---|---|"
    yield f"| on an idle engine | {1000 * statistics.median(idle):.1f} | 1 |"
    ratio = statistics.median(beside) / statistics.median(idle)
    yield f"| beside eight jobs of 512 | {1000 * statistics.median(beside):.1f} | {ratio:.2f} |"


def _overhead(engine: Engine, prompts: list[PreparedPrompt]) -> Iterator[str]:
    yield "| step at batch 16 | ms | of it not the model's forward |"
    yield "|---|---|---|"
    for name, options in (("greedy", GREEDY), ("sampled: temperature 0.6, top_p 0.95, top_k 20", SAMPLED)):
        steps, shares = [], []
        for _ in range(ROUNDS):
            before = engine.snapshot()
            with _forward_clock(engine) as forward:
                asked = replace(options, max_new_tokens=200)
                _read([engine.inbox.submit(anew(prompt), asked) for prompt in prompts[:16]])
            after = engine.snapshot()
            in_steps = after.step_seconds - before.step_seconds
            steps.append(in_steps / (after.steps - before.steps))
            shares.append(1 - sum(forward) / in_steps)
        yield f"| {name} | {1000 * statistics.median(steps):.2f} | {100 * statistics.median(shares):.0f} % |"


@contextmanager
def _forward_clock(engine: Engine) -> Iterator[list[float]]:
    """Collects the seconds of each call of the model's parts."""
    seconds: list[float] = []
    model = engine._runner._model
    hooks = []
    for part in (model.model, model.model.embed_tokens, model.lm_head, model.visual, model.mlp_AR):
        hooks.append(part.register_forward_pre_hook(lambda *_: seconds.append(-time.perf_counter())))
        hooks.append(part.register_forward_hook(lambda *_: seconds.append(time.perf_counter())))
    try:
        yield seconds
    finally:
        for hook in hooks:
            hook.remove()


def _generate(
    model: KeyeForConditionalGeneration, processor: KeyeProcessor, prompts: Sequence[PreparedPrompt], new: int
) -> None:
    batch = processor.pad_left(prompts)
    model.generate(**batch, do_sample=False, min_new_tokens=new, max_new_tokens=new)


def _read(pendings: Sequence[PendingGeneration]) -> None:
    for pending in pendings:
        for _ in pending.deltas():
            pass


def _seconds(action: Callable[[], None]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def _prompt(processor: KeyeProcessor, seed: int) -> PreparedPrompt:
    scene = draw_image_scene(np.random.default_rng(seed))
    content = [{"type": "image"}, {"type": "text", "text": scene.questions[0].text}]
    return processor.prepare([{"role": "user", "content": content}], images=[Image(scene.image)])
