"""Logprobs out of the engine, against the model's own forward pass over the same tokens."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from keye.worker.engine.inbox import Generated, SamplingOptions
from keye.worker.engine.step_loop import Engine
from keye.worker.engine.step_plan import StepLimits
from keye.worker.model.image_processing import Image, Video
from keye.worker.model.load import load_model
from keye.worker.model.processor import KeyeProcessor, PreparedPrompt

GOLDEN = Path(__file__).parents[1] / "golden"
ASKED = SamplingOptions(24, logprobs=True)
torch.set_num_threads(1)


@pytest.fixture(scope="module", params=["preview", "v1_5"])
def checkpoint(request: pytest.FixtureRequest) -> Path:
    return GOLDEN / request.param / "checkpoint"


@pytest.fixture
def start_engine(checkpoint: Path) -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def start(**options: Any) -> Engine:
        model, processor = load_model(checkpoint, dtype=torch.float32), KeyeProcessor.from_checkpoint(checkpoint)
        engines.append(Engine(model, processor, block_size=4, **options))
        engines[-1].start()
        return engines[-1]

    yield start
    for engine in engines:
        engine.stop()


def prompts(checkpoint: Path) -> list[PreparedPrompt]:
    processor, rng = KeyeProcessor.from_checkpoint(checkpoint), np.random.default_rng(0)
    pixels = rng.integers(0, 256, (4, 56, 84, 3), np.uint8)

    def about(content: Any, **media: Any) -> PreparedPrompt:
        return processor.prepare([{"role": "user", "content": [*content, {"type": "text", "text": "What?"}]}], **media)

    return [
        about([]),
        about([{"type": "image"}], images=[Image(pixels[0])]),
        about([{"type": "video"}], videos=[Video(pixels, fps=1.0)]),
    ]


def own_logprobs(checkpoint: Path, prompt: PreparedPrompt, generated: Generated) -> list[float]:
    """Of each token that was generated, by the model alone."""
    model, processor = load_model(checkpoint, dtype=torch.float32), KeyeProcessor.from_checkpoint(checkpoint)
    told = []
    with torch.inference_mode():
        out = model.generate(
            **processor.pad_left([prompt]),
            do_sample=False,
            max_new_tokens=len(generated.token_ids),
            prefix_allowed_tokens_fn=lambda _, ids: [generated.token_ids[len(ids) - len(prompt.input_ids)]],
            output_logits=True,
            return_dict_in_generate=True,
        )
    for logits, token_id in zip(out.logits, generated.token_ids, strict=True):
        told.append(float(logits[0].log_softmax(-1)[token_id]))
    return told


@pytest.mark.holds(
    "docs/answers.md#samples-probabilities-a-least-length",
    "`logprobs` adds to each answer its tokens with the natural logarithm of their probability",
)
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 1.3, "top_p": 0.9, "seed": 5}, {"repetition_penalty": 1.4}, {"max_thinking_tokens": 3}],
)
def test_logprobs_are_those_of_the_models_forward(
    start_engine: Callable[..., Engine], checkpoint: Path, options: dict[str, Any]
) -> None:
    limits = StepLimits(max_running=4, max_step_tokens=24)
    engine = start_engine(kv_cache_bytes=2**22, limits=limits)
    asked = prompts(checkpoint)
    beside = engine.inbox.submit(asked[0], replace(ASKED, logprobs=False, temperature=1.0))
    pendings = [engine.inbox.submit(prompt, replace(ASKED, **options)) for prompt in asked]
    for prompt, pending in zip(asked, pendings, strict=True):
        list(pending.deltas())
        generated = pending.generated
        assert len(generated.logprobs) == len(generated.token_ids)
        assert generated.logprobs == pytest.approx(own_logprobs(checkpoint, prompt, generated), abs=2e-4)
    list(beside.deltas())
    assert beside.generated.logprobs == ()


def test_nothing_is_lost_or_doubled_by_a_preemption(start_engine: Callable[..., Engine], checkpoint: Path) -> None:
    prompt = prompts(checkpoint)[0]
    plenty = start_engine(kv_cache_bytes=2**22)
    many = replace(ASKED, max_new_tokens=60, temperature=1.0, min_tokens=60)
    alone = [plenty.inbox.submit(prompt, replace(many, seed=seed)) for seed in range(6)]
    for pending in alone:
        list(pending.deltas())
    tight = start_engine(kv_cache_bytes=2**17)
    crowded = [tight.inbox.submit(prompt, replace(many, seed=seed)) for seed in range(6)]
    for one, other in zip(alone, crowded, strict=True):
        list(other.deltas())
        assert len(other.generated.token_ids) == 60
        assert other.generated.token_ids == one.generated.token_ids
        assert other.generated.logprobs == pytest.approx(one.generated.logprobs, abs=2e-4)
    assert tight.snapshot().preemptions > 0
