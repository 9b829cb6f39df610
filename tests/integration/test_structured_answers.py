"""Answers that have to fit a schema, through the whole engine on the small checkpoints, beside others and alone."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from keye.config.codes import ErrorCode
from keye.config.faults import Fault
from keye.worker.engine import constraint as constraints
from keye.worker.engine.constraint import Constraint
from keye.worker.engine.inbox import PendingGeneration, SamplingOptions
from keye.worker.engine.step_loop import Engine
from keye.worker.engine.step_plan import StepLimits
from keye.worker.model.load import load_model
from keye.worker.model.processor import KeyeProcessor
from keye.worker.results.thinking import answer_form, part_text
from tests.support.fitting import SCHEMAS, assert_fits

GOLDEN = Path(__file__).parents[1] / "golden"
PLENTY = 2**25
torch.set_num_threads(1)
Start = Callable[..., Engine]


@pytest.fixture(scope="module", params=["preview", "v1_5"])
def checkpoint(request: pytest.FixtureRequest) -> Path:
    return GOLDEN / request.param / "checkpoint"


@pytest.fixture(scope="module")
def processor(checkpoint: Path) -> KeyeProcessor:
    return KeyeProcessor.from_checkpoint(checkpoint)


@pytest.fixture
def start_engine(checkpoint: Path, processor: KeyeProcessor) -> Iterator[Start]:
    engines: list[Engine] = []

    def start(kv_cache_bytes: int = PLENTY, **limits: int) -> Engine:
        model = load_model(checkpoint, dtype=torch.float32)
        engines.append(Engine(model, processor, kv_cache_bytes=kv_cache_bytes, limits=StepLimits(**limits)))
        engines[-1].start()
        return engines[-1]

    yield start
    for engine in engines:
        engine.stop()


def submit(
    engine: Engine, processor: KeyeProcessor, sampling: SamplingOptions, schema: Any = None, mode: str = "no_think"
) -> PendingGeneration:
    prompt = processor.prepare([{"role": "user", "content": "What do you see?"}], [], [], mode)
    most = sampling.max_new_tokens
    constraint = None if schema is None else Constraint.of(processor, schema, mode, most)
    return engine.inbox.submit(prompt, sampling, constraint=constraint)


def read(pending: PendingGeneration) -> str:
    return "".join(delta.text for delta in pending.deltas())


@pytest.mark.holds(
    "docs/answers.md#answers-that-fit",
    "While the answer is written, no token is chosen that could not be part of one that fits",
    "An answer that comes near `max_new_tokens` is closed in time",
)
@pytest.mark.holds(
    "docs/design.md#decisions",
    "A schema is a grammar over all that is written",
    "What closes the answer is searched before `max_new_tokens` is near",
)
def test_all_fit_in_every_mode_cut_or_not_and_neighbours_get_what_they_would_alone(
    start_engine: Start, processor: KeyeProcessor
) -> None:
    """The blocks do not suffice for all, so some are preempted and go on."""
    engine = start_engine(kv_cache_bytes=2**19, max_running=12)
    jobs = []
    free = [SamplingOptions(60, seed=seed, temperature=float(seed % 2)) for seed in range(6)]
    alone = [read(submit(engine, processor, sampling)) for sampling in free]
    for seed, mode in enumerate(["no_think", "think", "auto"] * 2):
        for name, schema in SCHEMAS.items():
            sampling = SamplingOptions(
                [40, 200][seed % 2],
                temperature=float(seed > 2),
                top_k=40 * (seed % 2),
                top_p=0.9,
                repetition_penalty=1.1 if seed == 4 else 1,
                seed=seed,
                max_thinking_tokens=7 if seed == 5 else None,
            )
            jobs.append((name, mode, submit(engine, processor, sampling, schema, mode)))
        jobs.append(("", mode, submit(engine, processor, free[seed])))
    together = []
    for name, mode, pending in jobs:
        text = read(pending)
        assert text == pending.generated.text
        if name:
            assert_fits(SCHEMAS[name], part_text(text, answer_form(SCHEMAS[name], mode)).answer)
            assert len(pending.generated.token_ids) <= pending.sampling.max_new_tokens
        else:
            together.append(text)
    assert together == alone
    assert engine.snapshot().preemptions > 0, "the pool was large enough for all: this test needs a smaller one"
    assert engine.snapshot().blocks_used == 0


def test_a_seed_writes_the_same_that_fits_alone_and_in_company(start_engine: Start, processor: KeyeProcessor) -> None:
    sampling = SamplingOptions(80, temperature=0.9, seed=3)
    engine = start_engine()
    alone = read(submit(engine, processor, sampling, SCHEMAS["nested"], "auto"))
    others = [submit(engine, processor, replace(sampling, seed=n), SCHEMAS["object"]) for n in range(8)]
    again = submit(engine, processor, sampling, SCHEMAS["nested"], "auto")
    assert read(again) == alone
    for other in others:
        assert_fits(SCHEMAS["object"], read(other))


def test_one_that_goes_beyond_what_can_be_checked_fails_alone(
    start_engine: Start, processor: KeyeProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llguidance import LLParserLimits

    engine = start_engine()
    prompt = processor.prepare([{"role": "user", "content": "What do you see?"}], [], [], "no_think")
    sampling = SamplingOptions(400, temperature=1, seed=1)
    with monkeypatch.context() as patched:
        patched.setattr(constraints, "grammar_limits", lambda: LLParserLimits(max_lexer_states=120))
        broken = engine.inbox.submit(
            prompt, sampling, constraint=Constraint.of(processor, "[a-d]*a[a-d]{12}", "no_think", 400)
        )
    fine = [submit(engine, processor, replace(sampling, max_new_tokens=60), SCHEMAS["object"]) for _ in range(3)]
    with pytest.raises(Fault, match="beyond what can be checked against response_schema") as failed:
        read(broken)
    assert failed.value.code is ErrorCode.ANSWER_INCOMPLETE
    for pending in fine:
        assert_fits(SCHEMAS["object"], read(pending))
    assert engine.is_alive


def test_an_abandoned_one_leaves_the_others(start_engine: Start, processor: KeyeProcessor) -> None:
    engine = start_engine()
    sampling = SamplingOptions(3000, temperature=1, seed=1)
    endless = submit(engine, processor, sampling, ".*", "think")
    fine = submit(engine, processor, replace(sampling, max_new_tokens=60), SCHEMAS["object"])
    reading = endless.deltas()
    assert next(reading).num_tokens
    endless.abandon()
    assert read(fine)
    assert all(delta.num_tokens >= 0 for delta in reading)
    assert endless.generated.finish_reason == "abandoned"


def test_a_grammar_that_breaks_costs_nobody_else_anything(
    start_engine: Start, processor: KeyeProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start_engine()
    beside = submit(engine, processor, SamplingOptions(30))

    def fail(*_: int) -> int:
        raise ValueError("the parser is in a state of error")

    monkeypatch.setattr(Constraint, "take", fail)
    broken = submit(engine, processor, SamplingOptions(20), ["yes", "no"])
    with pytest.raises(Fault, match="ValueError") as caught:
        list(broken.deltas())
    assert caught.value.code is ErrorCode.INTERNAL
    list(beside.deltas())
    assert beside.generated.finish_reason in ("stop", "length")
    assert engine.is_alive
