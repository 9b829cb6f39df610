"""Thinking that is bounded, in the engine, with the small Keye, which thinks about what it sees."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from keye.config.codes import ErrorCode
from keye.config.faults import Fault
from keye.worker.demo.local_worker import SMALL_KEYE
from keye.worker.demo.scenes import draw_image_scene
from keye.worker.engine.inbox import Generated, SamplingOptions
from keye.worker.engine.step_loop import Engine
from keye.worker.engine.thinking_budget import ThinkingTags
from keye.worker.model.image_processing import Image
from keye.worker.model.load import load_model
from keye.worker.model.processor import KeyeProcessor, PreparedPrompt
from keye.worker.results.thinking import part_text

RANDOM_WEIGHTS = Path(__file__).parents[1] / "golden" / "preview" / "checkpoint"
GREEDY = SamplingOptions(160)
PLENTY = 2**25
torch.set_num_threads(1)
StartEngine = Callable[..., Engine]


@pytest.fixture(scope="module")
def processor() -> KeyeProcessor:
    return KeyeProcessor.from_checkpoint(SMALL_KEYE)


@pytest.fixture
def start_engine() -> Iterator[StartEngine]:
    engines: list[Engine] = []

    def start(checkpoint: Path = SMALL_KEYE, kv_cache_bytes: int = PLENTY) -> Engine:
        model, processor = load_model(checkpoint, dtype=torch.float32), KeyeProcessor.from_checkpoint(checkpoint)
        engines.append(Engine(model, processor, kv_cache_bytes=kv_cache_bytes))
        engines[-1].start()
        return engines[-1]

    yield start
    for engine in engines:
        engine.stop()


def ask(processor: KeyeProcessor, language: str = "en", seed: int = 1) -> tuple[PreparedPrompt, str]:
    """A question about a picture that is thought about, and its answer."""
    scene = draw_image_scene(np.random.default_rng(seed), num_shapes=3)
    question = next(q for q in scene.questions if q.kind == "caption" and q.language == language)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}]
    return processor.prepare(messages, [Image(np.asarray(scene.image))], thinking="think"), question.answer


def generate(engine: Engine, prompt: PreparedPrompt, options: SamplingOptions) -> Generated:
    pending = engine.inbox.submit(prompt, options)
    text = "".join(delta.text for delta in pending.deltas())
    assert text == pending.generated.text
    return pending.generated


def num_thought(generated: Generated, processor: KeyeProcessor) -> int:
    opening, closing = processor.tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    return generated.token_ids.index(closing) - generated.token_ids.index(opening) - 1


@pytest.mark.holds(
    "docs/producers.md#whether-it-thinks-first",
    "0 is no thinking",
    "A job that stays within them is answered as without the bound, token by token.",
)
@pytest.mark.holds("docs/model.md#prompt", "`<think>` and `</think>` are one token each")
@pytest.mark.parametrize("language", ["en", "zh"])
def test_thinking_is_cut_where_it_is_longer_and_else_nothing_is_changed(
    start_engine: StartEngine, processor: KeyeProcessor, language: str
) -> None:
    engine, (prompt, answer) = start_engine(), ask(processor, language)
    free = generate(engine, prompt, GREEDY)
    needed = num_thought(free, processor)
    thought = part_text(free.text).reasoning
    assert thought is not None
    for most in (0, 1, 4, needed - 1, needed, needed + 1):
        capped = generate(engine, prompt, replace(GREEDY, max_thinking_tokens=most))
        if most >= needed:
            assert capped.token_ids == free.token_ids
            continue
        parted = part_text(capped.text)
        assert num_thought(capped, processor) == most
        assert thought.startswith(parted.reasoning or "")
        assert capped.text.startswith(f"<think>{capped.text[7:].partition('</think>')[0]}</think><answer>")
        # The small model has learnt to answer at once, too.
        assert parted.answer == answer if most in (0, needed - 1) else parted.answer
        assert capped.finish_reason == "stop"
        assert "\ufffd" not in capped.text


@pytest.mark.parametrize("options", [GREEDY, replace(GREEDY, temperature=1.0, seed=7, repetition_penalty=1.1)])
def test_capped_and_others_are_what_each_is_alone_also_where_they_are_preempted(
    start_engine: StartEngine, processor: KeyeProcessor, options: SamplingOptions
) -> None:
    asked = [
        (ask(processor, language, seed)[0], replace(options, max_thinking_tokens=most))
        for seed in range(4)
        for language in ("en", "zh")
        for most in (None, 0, 4, 9)
    ]
    roomy = start_engine()
    alone = [generate(roomy, *each).token_ids for each in asked]
    crowded = start_engine(kv_cache_bytes=2**20)
    pendings = [crowded.inbox.submit(*each) for each in asked]
    for pending in pendings:
        for _ in pending.deltas():
            pass
    assert crowded.snapshot().preemptions > 0, "there was room for all: this test needs less"
    assert [pending.generated.token_ids for pending in pendings] == alone


def test_what_is_written_for_the_model_counts_as_seen_and_what_it_chose_instead_does_not(
    start_engine: StartEngine,
) -> None:
    """Held against a prompt that holds all of it: there nothing was chosen. Random weights change their mind easily."""
    processor = KeyeProcessor.from_checkpoint(RANDOM_WEIGHTS)
    engine, penalised = start_engine(RANDOM_WEIGHTS), replace(GREEDY, max_new_tokens=40, repetition_penalty=1.3)
    prompt = processor.prepare([{"role": "user", "content": "Count from 40 to 1."}])
    # Whatever such a model begins with begins its thinking.
    first, *_ = generate(engine, prompt, penalised).token_ids
    engine._thinking_tags = tags = ThinkingTags(first, 385, (385, 27, 314, 29))
    for most in range(8):
        capped = generate(engine, prompt, replace(penalised, max_thinking_tokens=most)).token_ids
        begun = 1 + most + len(tags.ending)
        assert capped[1 + most : begun] == tags.ending
        ids = torch.cat([prompt.input_ids, torch.tensor(capped[:begun])])
        longer = replace(prompt, input_ids=ids, position_ids=torch.arange(len(ids)).expand(3, -1))
        assert capped[begun:] == generate(engine, longer, replace(penalised, max_new_tokens=40 - begun)).token_ids


@pytest.mark.holds(
    "docs/producers.md#whether-it-thinks-first", "A model whose tokenizer has no such tokens ends it as `INVALID_JOB`."
)
def test_a_cap_is_refused_where_the_tokenizer_cannot_tell_where_thinking_ends(
    start_engine: StartEngine, tmp_path: Path
) -> None:
    checkpoint = Path(shutil.copytree(SMALL_KEYE, tmp_path / "checkpoint"))
    for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json"):
        file = checkpoint / name
        file.write_text(file.read_text().replace('"<think>"', '"<ponder>"'))
    other = KeyeProcessor.from_checkpoint(checkpoint)
    engine, (prompt, _) = start_engine(checkpoint), ask(other)
    with pytest.raises(Fault, match="max_thinking_tokens counts between <think> and </think>, which are no") as refused:
        generate(engine, prompt, replace(GREEDY, max_thinking_tokens=4))
    assert refused.value.code is ErrorCode.INVALID_JOB
    assert generate(engine, prompt, GREEDY).text
