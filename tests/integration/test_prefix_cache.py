"""Jobs that share what was computed of the same beginning, by the whole engine: each answer is as it is unshared."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from keye import Analyzer, JobResult
from keye.config.faults import Fault
from keye.worker.daemon.bench import anew
from keye.worker.demo.local_worker import SMALL_KEYE
from keye.worker.demo.scenes import draw_image_scene
from keye.worker.engine.inbox import Generated, PendingGeneration, SamplingOptions
from keye.worker.engine.step_loop import Engine
from keye.worker.engine.step_plan import StepLimits
from keye.worker.model.image_processing import Image, Video
from keye.worker.model.load import load_model
from keye.worker.model.processor import KeyeProcessor, PreparedPrompt
from tests.support.conditions import eventually
from tests.support.small_device import SmallDevice

GOLDEN = Path(__file__).parents[1] / "golden"
GREEDY = SamplingOptions(12)
OPTIONS = (
    GREEDY,
    replace(GREEDY, temperature=0.9, top_k=40, seed=11),
    replace(GREEDY, temperature=0.7, top_p=0.9, seed=5, repetition_penalty=1.2),
    replace(GREEDY, repetition_penalty=1.3),
)
torch.set_num_threads(1)


@dataclass
class Sharing:
    """An engine of one kind of checkpoint; `encoded` are the grids of all that went through its tower."""

    engine: Engine
    processor: KeyeProcessor
    encoded: list[Any] = field(default_factory=list)

    def ask(self, prompt: PreparedPrompt, options: SamplingOptions = GREEDY) -> PendingGeneration:
        return self.engine.inbox.submit(prompt, options)

    def prompt(self, *parts: str | Image | Video, before: tuple[dict[str, Any], ...] = ()) -> PreparedPrompt:
        return self.processor.prepare([*before, user(*parts)], *media_of(parts))


def user(*parts: str | Image | Video) -> dict[str, Any]:
    kinds = {Image: "image", Video: "video"}
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": kinds[type(p)]} for p in parts]
    return {"role": "user", "content": content}


def media_of(parts: tuple[str | Image | Video, ...]) -> tuple[list[Image], list[Video]]:
    return [part for part in parts if isinstance(part, Image)], [part for part in parts if isinstance(part, Video)]


def read(pending: PendingGeneration) -> Generated:
    for _ in pending.deltas():
        pass
    return pending.generated


def picture(seed: int, rows: int = 3) -> Image:
    return Image(np.random.default_rng(seed).integers(0, 256, (28 * rows, 84, 3), np.uint8))


def clip(seed: int) -> Video:
    return Video(np.random.default_rng(seed).integers(0, 256, (6, 56, 84, 3), np.uint8), fps=1.0)


@pytest.fixture(scope="module", params=["preview", "v1_5"])
def checkpoint(request: pytest.FixtureRequest) -> Path:
    return GOLDEN / request.param / "checkpoint"


@pytest.fixture
def start(checkpoint: Path) -> Iterator[Callable[..., Sharing]]:
    engines: list[Engine] = []

    def start(kv_cache_bytes: int = 2**25, **limits: int) -> Sharing:
        model, processor = load_model(checkpoint, dtype=torch.float32), KeyeProcessor.from_checkpoint(checkpoint)
        processor.eos_token_ids = ()  # all answers go through as many steps, whatever random weights say
        bounds = StepLimits(**{"max_running": 8} | limits)
        engine = Engine(model, processor, kv_cache_bytes=kv_cache_bytes, block_size=4, limits=bounds)
        engine.start()
        engines.append(engine)
        sharing = Sharing(engine, processor)
        model.visual.register_forward_pre_hook(lambda _, args: sharing.encoded.extend(map(tuple, args[1])))
        return sharing

    yield start
    for engine in engines:
        engine.stop()


def conversations(sharing: Sharing) -> list[PreparedPrompt]:
    """Media first and text first, the same clip twice, another picture of the same size, two pictures in either order,
    conversations that go on, and text alone."""
    one, other, film = picture(1), picture(2), clip(1)
    first = sharing.prompt(film, "What happens?")
    answer = sharing.processor.tokenizer.decode(read(sharing.ask(anew(first))).token_ids, skip_special_tokens=True)
    before = (user(film, "What happens?"), {"role": "assistant", "content": answer})
    goes_on = [*before, user("And then?")]
    return [
        first,
        sharing.prompt(clip(1), "What happens?"),
        sharing.prompt(film, "How many are there, and of which colours?"),
        sharing.prompt(clip(2), "What happens?"),
        sharing.processor.prepare(goes_on, [], [film]),
        sharing.prompt(one, "What is this?"),
        sharing.prompt(other, "What is this?"),
        sharing.prompt("What is this, and what is it made of? Look: ", one),
        sharing.prompt("What is this, and what is it made of? Look: ", other),
        sharing.prompt(one, other, "Which is larger?"),
        sharing.prompt(other, one, "Which is larger?"),
        sharing.prompt(one, film, "Is it the same?"),
        sharing.prompt("Tell me of the sea, at some length, and of all that swims in it."),
        sharing.prompt("Tell me of the sea, at some length, and of all that flies above it."),
    ]


@pytest.mark.holds(
    "docs/answers.md#what-is-shared-between-jobs", "A job that begins with the same tokens and the same media"
)
@pytest.mark.parametrize("trouble", ["none", "few blocks", "out of memory", "cancelled"])
def test_every_answer_is_the_one_that_is_given_unshared(
    start: Callable[..., Sharing], monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    sharing = start()
    prompts = conversations(sharing)
    expected = {}
    for number, prompt in enumerate(prompts):
        for options in OPTIONS:
            expected[number, options] = read(sharing.ask(anew(prompt), options))
    assert not any(generated.num_cached_tokens for generated in expected.values())

    most = max(len(prompt.input_ids) for prompt in prompts) + GREEDY.max_new_tokens
    if trouble == "few blocks":
        block = sharing.engine._cache.keys[0][0].nbytes * 2 * len(sharing.engine._cache.keys)
        sharing = start(kv_cache_bytes=block * (most // 4 + 12), max_step_tokens=64)
    if trouble == "out of memory":
        SmallDevice(sharing.engine, monkeypatch, max_tokens=20)
    asked = 2 * list(expected)
    random.Random(trouble).shuffle(asked)
    pendings = [(each, sharing.ask(prompts[each[0]], each[1])) for each in asked]
    if trouble == "cancelled":
        for _, pending in pendings[::5]:
            eventually(lambda pending=pending: pending.has_begun or pending.has_ended)
            pending.abandon()
    for each, pending in pendings:
        generated = read(pending)
        ids = expected[each].token_ids
        assert generated.token_ids == (ids if generated.finish_reason == "length" else ids[: len(generated.token_ids)])
        assert generated.num_cached_tokens < generated.num_prompt_tokens
    now = sharing.engine.snapshot()
    assert now.blocks_used == 0
    assert (now.preemptions > 0) is (trouble == "few blocks")
    assert (now.out_of_memory > 0) is (trouble == "out of memory")
    assert sum(pending.generated.finish_reason == "length" for _, pending in pendings) >= 0.75 * len(asked)
    cached = sum(pending.generated.num_cached_tokens for _, pending in pendings)
    assert cached > (0.1 if trouble == "few blocks" else 0.5) * sum(len(prompts[each[0]].input_ids) for each in asked)


@pytest.mark.holds("docs/answers.md#many-questions-about-one-clip", "the model reads it once")
@pytest.mark.holds(
    "docs/operations.md#is-a-clip-decoded-again-for-each-question-about-it",
    "Nor does the model read it again, where the question follows the clip",
)
def test_questions_about_one_clip_that_come_together_encode_and_read_it_once(start: Callable[..., Sharing]) -> None:
    sharing = start(max_step_tokens=40)
    media = sharing.processor.prepare_media([], [clip(3)])
    texts = [f"{word} is it?" for word in ("What", "Who", "Where", "When", "Why", "How large", "How old", "Whose")]
    prompts = [sharing.processor.prepare_text([user(clip(3), text)], media) for text in texts]
    before = sharing.engine.snapshot()
    pendings = [sharing.ask(prompt) for prompt in prompts]
    cached = [read(pending).num_cached_tokens for pending in pendings]
    num_items = 6 if sharing.processor.config.splits_video_into_frames else 1
    assert len(sharing.encoded) == num_items
    assert cached[0] == 0
    assert min(cached[1:]) >= prompts[0].num_visual_tokens
    num_read = sharing.engine.snapshot().prefill_tokens - before.prefill_tokens
    assert num_read == sum(len(prompt.input_ids) for prompt in prompts) - sum(cached)


@pytest.mark.holds(
    "docs/answers.md#what-is-shared-between-jobs",
    "Where prompts differ and pictures do not, the pictures are still encoded once.",
)
def test_a_picture_behind_other_words_is_encoded_once(start: Callable[..., Sharing]) -> None:
    sharing = start()
    prompts = [sharing.prompt(f"{word} is shown here? ", picture(4)) for word in ("What", "Who", "Where")]
    for pending in [sharing.ask(prompt) for prompt in prompts]:
        read(pending)
    read(sharing.ask(sharing.prompt(picture(5), "and", picture(4))))
    assert len(sharing.encoded) == 2, "in one step, and in a later one"
    read(sharing.ask(sharing.prompt("Which? ", picture(4, rows=2))))
    assert len(sharing.encoded) == 3


def test_encoded_media_give_way_where_memory_runs_out(
    start: Callable[..., Sharing], monkeypatch: pytest.MonkeyPatch
) -> None:
    sharing = start()
    read(sharing.ask(sharing.prompt(picture(6), "What?")))
    forward = sharing.engine._runner._model.model.forward

    def beside_nothing(*args: Any, **kwargs: Any) -> Any:
        if sharing.engine._runner._rows._rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*args, **kwargs)

    monkeypatch.setattr(sharing.engine._runner._model.model, "forward", beside_nothing)
    read(sharing.ask(sharing.prompt("Tell me of the sea.")))
    now = sharing.engine.snapshot()
    assert now.out_of_memory == 0
    assert now.max_step_tokens == StepLimits().max_step_tokens, "no step is the smaller for it"


def test_numbers_that_are_not_finite_stay_with_who_met_them(start: Callable[..., Sharing]) -> None:
    sharing = start()
    good = sharing.prompt("Tell me of the sea, and of this: ", picture(7), picture(8))
    expected = read(sharing.ask(anew(good)))
    assert good.pixel_values is not None
    pixels = good.pixel_values.float()
    pixels[len(pixels) // 2 :] = torch.nan
    poisoned = replace(good, pixel_values=pixels, image_digests=())
    read(sharing.ask(good))
    for _ in range(2):
        with pytest.raises(Fault, match="overflowed"):
            read(sharing.ask(poisoned))
        again = read(sharing.ask(good))
        assert again.token_ids == expected.token_ids
        assert again.num_cached_tokens > 0, "what was computed before it is as good as it was"


def test_a_step_that_breaks_off_leaves_nothing_to_who_gets_its_blocks(
    start: Callable[..., Sharing], monkeypatch: pytest.MonkeyPatch
) -> None:
    sharing = start()
    prompt = sharing.prompt("Tell me of the sea.")
    expected = read(sharing.ask(anew(prompt)))
    decoder = sharing.engine._runner._model.model
    forward = decoder.forward

    def break_off(embeds: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        forward(embeds * torch.nan, *args, **kwargs)
        raise ValueError("after all layers")

    monkeypatch.setattr(decoder, "forward", break_off)
    with pytest.raises(Fault, match="ValueError"):
        read(sharing.ask(sharing.prompt("Tell me of the sea, at some length, and of all that swims in it.")))
    monkeypatch.setattr(decoder, "forward", forward)
    assert read(sharing.ask(prompt)).token_ids == expected.token_ids


def test_a_fault_of_a_moment_is_not_kept(start: Callable[..., Sharing]) -> None:
    sharing = start()
    prompt = sharing.prompt("Tell me of this: ", picture(7))
    projector = sharing.engine._runner._model.mlp_AR
    hook = projector.register_forward_hook(lambda _, __, rows: rows * torch.nan)
    with pytest.raises(Fault, match="overflowed"):
        read(sharing.ask(prompt))
    hook.remove()
    assert read(sharing.ask(prompt)).token_ids == read(sharing.ask(anew(prompt))).token_ids


@pytest.mark.holds(
    "docs/answers.md#what-is-shared-between-jobs",
    "`KEYE_PREFIX_CACHE=false` shares nothing between jobs; the questions and samples of one job share all the same.",
)
def test_without_sharing_jobs_find_nothing_of_others_but_questions_of_one_do(start: Callable[..., Sharing]) -> None:
    sharing = start()
    sharing.processor.shares_prefixes = False
    media = [sharing.processor.prepare_media([picture(9)], []) for _ in range(2)]
    cached = [
        read(sharing.ask(sharing.processor.prepare_text([user(picture(9), text)], of))).num_cached_tokens
        for of in media
        for text in ("What is it?", "Whose is it?")
    ]
    assert [bool(number) for number in cached] == [False, True, False, True]
    assert len(sharing.encoded) == 2


def test_a_worker_says_how_much_of_a_prompt_it_had_and_shares_nothing_where_it_is_told_so() -> None:
    shown = draw_image_scene(np.random.default_rng(3), num_shapes=1).image
    cached = []
    for settings in ({}, {"prefix_cache": False}):
        with Analyzer(SMALL_KEYE, device="cpu", **settings) as analyzer:
            results = [analyzer.analyze(shown, "What do you see?", max_new_tokens=8) for _ in range(2)]
            assert all(isinstance(result, JobResult) for result in results)
            cached.append([result.usage.cached_tokens for result in results])
    (first, again), unshared = cached
    assert first == 0
    assert again > 0
    assert unshared == [0, 0]
