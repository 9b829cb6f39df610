"""The whole engine on the small checkpoint with random weights: real tower, real decoder, real threads, on the CPU."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from keye.config.codes import ErrorCode
from keye.config.faults import Fault
from keye.worker.engine.inbox import PendingGeneration, SamplingOptions
from keye.worker.engine.step_loop import Engine
from keye.worker.engine.step_plan import StepLimits
from keye.worker.host_fault import HostFault
from keye.worker.model.image_processing import Image, Video
from keye.worker.model.keye import KeyeForConditionalGeneration
from keye.worker.model.load import load_model
from keye.worker.model.processor import KeyeProcessor, PreparedPrompt
from tests.support.conditions import eventually
from tests.support.small_device import SmallDevice

CHECKPOINT = Path(__file__).parents[1] / "golden" / "preview" / "checkpoint"
GREEDY = SamplingOptions(16)
PLENTY = 2**25
torch.set_num_threads(1)  # The models are tiny; threads that wait for each other only slow them down.


@pytest.fixture(scope="module")
def processor() -> KeyeProcessor:
    return KeyeProcessor.from_checkpoint(CHECKPOINT)


@pytest.fixture(scope="module")
def plain_model() -> KeyeForConditionalGeneration:
    """Another instance than any engine's, for `generate`."""
    return load_model(CHECKPOINT, dtype=torch.float32)


@pytest.fixture
def start_engine(processor: KeyeProcessor) -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def start(kv_cache_bytes: int = PLENTY, dtype: torch.dtype = torch.float32, **limits: int) -> Engine:
        model = load_model(CHECKPOINT, dtype=dtype)
        engines.append(Engine(model, processor, kv_cache_bytes=kv_cache_bytes, limits=StepLimits(**limits)))
        engines[-1].start()
        return engines[-1]

    yield start
    for engine in engines:
        engine.stop()


def make_prompt(processor: KeyeProcessor, kind: int, seed: int) -> PreparedPrompt:
    """Text alone, one to three images, a video, or images and a video: `kind` 0 to 5."""
    rng = np.random.default_rng(seed)
    num_images, num_videos = [(0, 0), (1, 0), (2, 0), (3, 0), (0, 1), (2, 1)][kind]
    images = [Image(rng.integers(0, 256, (28 * int(rng.integers(2, 6)), 84, 3), np.uint8)) for _ in range(num_images)]
    videos = [Video(rng.integers(0, 256, (4, 56, 84, 3), np.uint8), fps=1.0) for _ in range(num_videos)]
    content = [{"type": "image"}] * num_images + [{"type": "video"}] * num_videos
    content.append({"type": "text", "text": "What do you see? " * (1 + seed % 7)})
    return processor.prepare([{"role": "user", "content": content}], images=images, videos=videos)


def generate(
    model: KeyeForConditionalGeneration, processor: KeyeProcessor, prompt: PreparedPrompt, new: int
) -> list[int]:
    batch = processor.pad_left([prompt])
    whole = model.generate(**batch, do_sample=False, temperature=None, top_k=None, top_p=None, max_new_tokens=new)
    return whole[0, len(prompt.input_ids) :].tolist()


def read(pending: PendingGeneration) -> str:
    return "".join(delta.text for delta in pending.deltas())


@pytest.mark.holds("docs/design.md#decisions", "Jobs join and leave the running batch at every step")
@pytest.mark.holds(
    "docs/operations.md#how-many-jobs-does-a-gpu-hold-and-what-must-i-lower",
    "What does not fit beside the others waits in the engine, and nothing is lost.",
)
def test_mixed_jobs_give_what_each_gives_alone(
    start_engine: Callable[..., Engine], processor: KeyeProcessor, plain_model: KeyeForConditionalGeneration
) -> None:
    """32 jobs of all kinds arrive at random, two are abandoned, and the blocks do not suffice for all."""
    rng = random.Random(5)
    prompts = [make_prompt(processor, kind=n % 6, seed=n) for n in range(32)]
    lengths = [5, 300, *(round(5 * 60 ** rng.random()) for _ in prompts[2:])]  # few of them long: each runs alone, too
    abandoned = {6, 19}
    engine = start_engine(kv_cache_bytes=3 * 2**18, max_running=16, max_step_tokens=192)
    pendings: list[PendingGeneration] = []
    for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        pendings.append(engine.inbox.submit(prompt, replace(GREEDY, max_new_tokens=length)))
        if number in abandoned:
            pendings[-1].abandon()
        time.sleep(rng.expovariate(200))
    texts = [read(pending) for pending in pendings]

    assert engine.snapshot().preemptions > 0, "the pool was large enough for all: this test needs a smaller one"
    assert engine.snapshot().blocks_used == 0
    for number, (pending, prompt, length, text) in enumerate(zip(pendings, prompts, lengths, texts, strict=True)):
        generated = pending.generated
        expected = generate(plain_model, processor, prompt, length)
        if number in abandoned:
            assert generated.finish_reason == "abandoned"
            expected = expected[: len(generated.token_ids)]
        assert list(generated.token_ids) == expected, f"job {number} differs"
        assert text == generated.text == processor.tokenizer.decode(expected, skip_special_tokens=True)


def test_seeded_text_is_the_same_alone_and_in_company(
    start_engine: Callable[..., Engine], processor: KeyeProcessor
) -> None:
    options = replace(GREEDY, max_new_tokens=40, temperature=0.9, top_k=30, top_p=0.95, seed=3)
    prompt = make_prompt(processor, 1, 1)
    engine = start_engine()
    alone = engine.inbox.submit(prompt, options)
    read(alone)
    other = replace(options, temperature=1.3, seed=None)
    company = [engine.inbox.submit(make_prompt(processor, n % 6, n), other) for n in range(8)]
    beside = engine.inbox.submit(prompt, options)
    for pending in (*company, beside):
        read(pending)
    assert alone.generated.token_ids == beside.generated.token_ids


def test_stop_string_ends_the_text_before_it(start_engine: Callable[..., Engine], processor: KeyeProcessor) -> None:
    engine, prompt = start_engine(), make_prompt(processor, 0, 0)
    whole = engine.inbox.submit(prompt, GREEDY)
    text = read(whole)
    stop = text[len(text) // 2 :][:3]
    cut = engine.inbox.submit(prompt, replace(GREEDY, stop=(stop,)))
    assert read(cut) == text[: text.index(stop)]
    assert cut.generated.finish_reason == "stop"
    assert len(cut.generated.token_ids) < len(whole.generated.token_ids)


@pytest.mark.holds("docs/design.md#decisions", "deadlines and cancelling are the engine's, between steps")
def test_abandoned_and_late_generations_end_at_once_with_what_they_wrote(
    start_engine: Callable[..., Engine], processor: KeyeProcessor
) -> None:
    """One of each while it decodes, and while it waits for a place."""
    engine = start_engine(max_running=2)
    long = replace(GREEDY, max_new_tokens=4000)
    prompts = [make_prompt(processor, 0, n) for n in range(5)]
    running, blocker = (engine.inbox.submit(prompt, long) for prompt in prompts[:2])
    waiting = engine.inbox.submit(prompts[2], long, priority=1)
    late_waiting = engine.inbox.submit(prompts[3], long, priority=1, deadline=time.monotonic() + 0.1)
    first = next(running.deltas())
    read(late_waiting)
    waiting.abandon()
    read(waiting)
    # Its place is free only now that nobody waits for one.
    blocker.abandon()
    late = engine.inbox.submit(prompts[4], long, deadline=time.monotonic() + 1)
    read(late)
    running.abandon()
    text = first.text + read(running)

    assert [p.generated.finish_reason for p in (running, late)] == ["abandoned", "deadline"]
    assert [p.generated.finish_reason for p in (waiting, late_waiting)] == ["abandoned", "deadline"]
    assert text == running.generated.text != ""
    assert late.generated.token_ids
    assert waiting.generated.token_ids == late_waiting.generated.token_ids == ()
    assert late_waiting.generated.first_token_seconds is None
    assert engine.snapshot().blocks_used == 0


def test_generation_is_abandoned_in_the_middle_of_its_prompt(
    start_engine: Callable[..., Engine], processor: KeyeProcessor
) -> None:
    engine = start_engine(max_running=2, max_step_tokens=2)
    pending = engine.inbox.submit(make_prompt(processor, 3, 6), GREEDY)
    eventually(lambda: engine.snapshot().prefill_tokens > 4)
    pending.abandon()
    assert read(pending) == ""
    assert engine.snapshot().prefill_tokens < len(pending.prompt.input_ids)
    assert engine.snapshot().blocks_used == 0


def test_higher_priority_is_answered_first(start_engine: Callable[..., Engine], processor: KeyeProcessor) -> None:
    engine = start_engine(max_running=1)
    blocker = engine.inbox.submit(make_prompt(processor, 0, 0), replace(GREEDY, max_new_tokens=4000))
    next(blocker.deltas())
    low = engine.inbox.submit(make_prompt(processor, 0, 1), GREEDY, priority=2)
    high = engine.inbox.submit(make_prompt(processor, 0, 2), GREEDY, priority=0)
    blocker.abandon()  # not before both wait for its place
    for pending in (blocker, high, low):
        read(pending)
    assert blocker.generated.finish_reason == "abandoned"
    # By the engine's clock: what this thread sees of it depends on how busy the machine is.
    high_ended_at = high.submitted_at + high.generated.queued_seconds + high.generated.generate_seconds
    assert low.submitted_at + low.generated.queued_seconds >= high_ended_at
    assert low.generated.queued_seconds > high.generated.queued_seconds


@pytest.mark.holds(
    "docs/operations.md#is-it-up-and-is-it-taking-jobs",
    "`max_tokens` is what a prompt and its answer may have together there",
)
def test_prompt_and_answer_larger_than_the_pool_are_refused_at_the_door(
    start_engine: Callable[..., Engine], processor: KeyeProcessor
) -> None:
    engine = start_engine(kv_cache_bytes=2**20)
    prompt = make_prompt(processor, 0, 0)
    limit = engine.inbox.max_tokens
    with pytest.raises(Fault, match=f"this worker holds {limit}") as refused:
        engine.inbox.submit(prompt, replace(GREEDY, max_new_tokens=limit))
    assert refused.value.code is ErrorCode.PROMPT_TOO_LONG
    largest = replace(GREEDY, max_new_tokens=limit - len(prompt.input_ids))
    read(pending := engine.inbox.submit(prompt, largest))
    assert pending.generated.finish_reason in ("length", "stop")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        pytest.param(
            lambda p: replace(p, input_ids=torch.where(p.input_ids == p.input_ids[0], 9999, p.input_ids)),
            "IndexError",
            id="token-id",
        ),
        pytest.param(lambda p: replace(p, image_grid_thw=p.image_grid_thw[:-1]), "job", id="media-do-not-fit"),
    ],
)
def test_faulty_input_fails_its_own_sequence_only(
    start_engine: Callable[..., Engine],
    processor: KeyeProcessor,
    plain_model: KeyeForConditionalGeneration,
    fault: Callable[[PreparedPrompt], PreparedPrompt],
    words: str,
) -> None:
    engine = start_engine()
    good_prompts = [make_prompt(processor, n % 6, n) for n in range(5)]
    good = [engine.inbox.submit(prompt, GREEDY) for prompt in good_prompts[:3]]
    bad = engine.inbox.submit(fault(make_prompt(processor, 2, 9)), GREEDY)
    good += [engine.inbox.submit(prompt, GREEDY) for prompt in good_prompts[3:]]
    with pytest.raises(Fault, match=words) as raised:
        read(bad)
    assert raised.value.code is ErrorCode.INTERNAL
    for pending, prompt in zip(good, good_prompts, strict=True):
        read(pending)
        assert list(pending.generated.token_ids) == generate(plain_model, processor, prompt, 16)
    assert engine.is_alive


@pytest.mark.holds("docs/design.md#one-job-walked", "Where memory runs out, the batch is halved")
@pytest.mark.holds("docs/alerts.md#keyeoutofmemory", "Workers halve the batch and go on, slower.")
@pytest.mark.holds("docs/from-a-script.md#pixels-precision-memory", "halves a step")
def test_step_that_does_not_fit_is_halved_and_the_limit_is_learned(
    start_engine: Callable[..., Engine],
    processor: KeyeProcessor,
    plain_model: KeyeForConditionalGeneration,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = start_engine()
    SmallDevice(engine, monkeypatch, max_tokens=20)
    prompts = [make_prompt(processor, n % 6, n) for n in range(6)]
    pendings = [engine.inbox.submit(prompt, GREEDY) for prompt in prompts]
    for pending, prompt in zip(pendings, prompts, strict=True):
        read(pending)
        assert list(pending.generated.token_ids) == generate(plain_model, processor, prompt, 16)
    assert engine._scheduler.limits.max_step_tokens <= 20


@pytest.mark.holds("docs/from-a-script.md#pixels-precision-memory", "Only a job that alone is too large fails")
def test_job_without_room_for_a_single_token_fails_and_says_how_large_it_is(
    start_engine: Callable[..., Engine], processor: KeyeProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, prompt = start_engine(), make_prompt(processor, 1, 1)
    SmallDevice(engine, monkeypatch, max_tokens=0)
    with pytest.raises(Fault, match=f"for a job of {len(prompt.input_ids)} tokens. Shorten the text") as raised:
        read(engine.inbox.submit(prompt, GREEDY))
    assert raised.value.code is ErrorCode.OUT_OF_MEMORY


def test_sequence_whose_numbers_overflow_fails_and_leaves_nothing_behind(
    start_engine: Callable[..., Engine], processor: KeyeProcessor, plain_model: KeyeForConditionalGeneration
) -> None:
    engine = start_engine(kv_cache_bytes=2**19)
    prompt = make_prompt(processor, 1, 0)
    assert prompt.pixel_values is not None
    poisoned = replace(prompt, pixel_values=prompt.pixel_values * torch.nan)  # floats stand as they are
    with pytest.raises(Fault, match="overflowed"):
        read(engine.inbox.submit(poisoned, GREEDY))
    read(after := engine.inbox.submit(prompt, GREEDY))
    assert list(after.generated.token_ids) == generate(plain_model, processor, prompt, 16)


def test_dead_step_thread_leaves_nobody_waiting(
    start_engine: Callable[..., Engine], processor: KeyeProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start_engine(max_running=1)
    pendings = [engine.inbox.submit(make_prompt(processor, 0, n), replace(GREEDY, max_new_tokens=5000)) for n in (1, 2)]
    next(pendings[0].deltas())

    def die(*_: Any) -> None:
        raise SystemExit("the step thread was told to go")

    monkeypatch.setattr(engine._runner, "run", die)
    for pending in pendings:
        with pytest.raises(HostFault, match="the engine died of SystemExit") as died:
            read(pending)
        assert died.value.is_final
    assert not engine.is_alive
    with pytest.raises(HostFault, match="the engine died of SystemExit"):
        engine.inbox.submit(make_prompt(processor, 0, 3), GREEDY)


def test_stopping_ends_what_runs_as_abandoned(start_engine: Callable[..., Engine], processor: KeyeProcessor) -> None:
    engine = start_engine()
    pending = engine.inbox.submit(make_prompt(processor, 0, 1), replace(GREEDY, max_new_tokens=5000))
    first = next(pending.deltas())
    engine.stop()
    assert first.text + read(pending) == pending.generated.text
    assert pending.generated.finish_reason == "abandoned"
    with pytest.raises(Fault, match="stopped"):
        engine.inbox.submit(make_prompt(processor, 0, 1), GREEDY)


def test_engine_that_took_a_model_over_leaves_other_models_alone(
    start_engine: Callable[..., Engine], processor: KeyeProcessor, plain_model: KeyeForConditionalGeneration
) -> None:
    engine, prompt = start_engine(), make_prompt(processor, 2, 1)
    engine.warm_up()
    pending = engine.inbox.submit(prompt, GREEDY)
    done = threading.Thread(target=lambda: read(pending))
    done.start()
    expected = generate(plain_model, processor, prompt, 16)
    done.join(timeout=30)
    assert list(pending.generated.token_ids) == expected


def test_engine_that_is_warm_has_seen_an_image_and_a_video(start_engine: Callable[..., Engine]) -> None:
    engine = start_engine()
    seen: list[list[int]] = []
    engine._runner._model.visual.register_forward_pre_hook(lambda _, args: seen.extend(args[1]))
    engine.warm_up()
    assert [num_frames > 1 for num_frames, _, _ in seen] == [False, True]


def test_half_precision_runs_all_kinds_of_jobs(start_engine: Callable[..., Engine], processor: KeyeProcessor) -> None:
    engine = start_engine(dtype=torch.bfloat16)
    sampled = replace(GREEDY, temperature=0.6, top_p=0.95, top_k=20, repetition_penalty=1.1)
    pendings = [engine.inbox.submit(make_prompt(processor, n % 6, n), (GREEDY, sampled)[n % 2]) for n in range(12)]
    for pending in pendings:
        read(pending)
        assert 1 <= len(pending.generated.token_ids) <= 16
