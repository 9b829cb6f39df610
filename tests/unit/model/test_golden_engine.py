"""The reference's greedy tokens out of the engine: rows side by side, prompts in chunks, blocks scattered, shared."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from keye.worker.engine.inbox import SamplingOptions
from keye.worker.engine.step_loop import Engine
from keye.worker.engine.step_plan import StepLimits
from keye.worker.model import padded_attention
from keye.worker.model.load import load_model
from keye.worker.model.processor import KeyeProcessor


@pytest.fixture(scope="module")
def engine_for() -> Iterator[Callable[[Path, KeyeProcessor], Engine]]:
    """An engine a checkpoint, stopped after the last case."""
    engines: dict[Path, Engine] = {}

    def find_or_start(checkpoint: Path, processor: KeyeProcessor) -> Engine:
        if checkpoint not in engines:
            model = load_model(checkpoint, dtype=torch.float32)
            limits = StepLimits(max_running=4, max_step_tokens=24)
            engines[checkpoint] = Engine(model, processor, kv_cache_bytes=2**25, block_size=4, limits=limits)
            engines[checkpoint].start()
        return engines[checkpoint]

    yield find_or_start
    for engine in engines.values():
        engine.stop()


@pytest.mark.holds(
    "docs/model.md#text-decoder",
    "The engine gives a step's paged batch and touches nothing of transformers there",
)
def test_engine_gives_the_greedy_tokens_of_the_reference(
    golden_case: Any, engine_for: Callable[[Path, KeyeProcessor], Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A paged pass needs none of what transformers may rename next.
    monkeypatch.delattr(padded_attention, "create_causal_mask")
    if "generated_ids" not in golden_case.arrays:
        return
    expected = golden_case.arrays["generated_ids"].tolist()
    greedy = SamplingOptions(len(expected[0]))
    engine = engine_for(golden_case.generation / "checkpoint", golden_case.processor)
    # The second time all but the end of each prompt is found.
    for is_again in (False, True):
        pendings = [engine.inbox.submit(prompt, greedy) for prompt in golden_case.prepare(golden_case.processor)]
        for pending in pendings:
            for _ in pending.deltas():
                pass
        assert [list(pending.generated.token_ids) for pending in pendings] == expected
        unread = [each.generated.num_prompt_tokens - each.generated.num_cached_tokens for each in pendings]
        assert not is_again or max(unread) <= 4
