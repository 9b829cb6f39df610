"""Several answers to one look, and answers that fit: what more questions about a clip cost, what was found in the cache
of prefixes, and whether every structured answer is valid.
"""

import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from fractions import Fraction
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import av
import numpy as np
import torch
from jsonschema import ValidationError

from keye import Analyzer, InvalidJob, JobResult, Thinking
from keye.config.outcome import Answer
from keye.config.response_schema import _fault_of
from keye.producer.client import build_job
from keye.worker.demo.local_worker import SMALL_KEYE
from keye.worker.demo.scenes import draw_image_scene, draw_video_scene
from keye.worker.engine.constraint import Constraint, Vocabulary
from keye.worker.engine.inbox import SamplingOptions
from keye.worker.engine.step_loop import Engine
from keye.worker.model.configuration_keye import KeyeConfig
from keye.worker.model.keye import KeyeForConditionalGeneration
from keye.worker.model.load import load_model
from keye.worker.model.processor import KeyeProcessor, PreparedPrompt
from tests.support.fitting import SCHEMAS, assert_fits
from tests.unit.config.test_response_schema import REFUSED

ROUNDS = 5
NUM_FRAMES = 64
JOBS_EACH = 50
SHORT = {"max_new_tokens": 16, "min_tokens": 16, "temperature": 0}
QUESTIONS = (
    "What is in the video?",
    "Which colour is it?",
    "Where does it go?",
    "What is behind it?",
    "How many are there?",
    "Is it a circle?",
    "Does it stay in place?",
    "What comes at the end?",
)
SYSTEM = "You look at clips of one shape before a wall. Tell what it is, which colour it has and where it goes. " * 8

NUM_TOKENS = 151936
MOST = 1000
_NUMBER = {"type": "integer", "minimum": 0, "maximum": 99}
LONG: dict[str, Any] = {
    "100 numbers": {"type": "array", "items": _NUMBER, "minItems": 100, "maxItems": 100},
    "40 words": {
        "type": "array",
        "items": {"type": "string", "minLength": 3, "maxLength": 9},
        "minItems": 40,
        "maxItems": 40,
    },
}


def run() -> str:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = [*_refused(), ""]
        with Analyzer(SMALL_KEYE, device="cpu") as analyzer:
            clips = Clips(folder)
            for part in (_many_questions(analyzer, clips), _cached(analyzer, clips), _valid(analyzer, folder)):
                lines += [*part, ""]
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return "\n".join([*lines, *_steps(folder), ""])
        finally:
            torch.set_num_threads(num_threads)


class Clips:
    """Each is of 64 frames, and like no other before it."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._numbers = folder, count()

    def draw(self) -> str:
        number = next(self._numbers)
        scene = draw_video_scene(np.random.default_rng(number))
        path = self._folder / f"{number}.mp4"
        with av.open(path, "w") as container:
            stream = container.add_stream("libx264", rate=Fraction(2))
            stream.width, stream.height = scene.size
            stream.pix_fmt = "yuv420p"
            for pixels in scene.frames(NUM_FRAMES / scene.seconds):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode(None))
        return str(path)


def _many_questions(analyzer: Analyzer, clips: Clips) -> Iterator[str]:
    def ask(clip: str, *jobs: Mapping[str, Any]) -> list[JobResult]:
        sent = analyzer.submit_many({"media": clip, "generation": SHORT, **job} for job in jobs)
        return [job.result() for job in sent]

    asked = [{"prompt": each} for each in QUESTIONS]
    (together,), apart = ask(clip := clips.draw(), {"questions": asked}), ask(clip, *asked)
    texts = [each.answer for each in together.answers if isinstance(each, Answer)]
    assert texts == [each.answer for each in apart], "they do not answer alike"
    ways: dict[str, list[dict[str, Any]]] = {
        "a job of 1 question": [asked[0]],
        f"a job of {len(asked)} questions": [{"questions": asked}],
        f"{len(asked)} jobs of 1 question, sent together": [*asked],
    }
    rounds = []
    for _ in range(ROUNDS):
        rounds.append([_seconds(partial(ask, clips.draw(), *jobs)) for jobs in ways.values()])
    yield f"A clip of {NUM_FRAMES} frames never seen before, 16 new tokens a question; medians of {ROUNDS} rounds.\n"
    yield "| | s | ratio, of each round |"
    yield "|---|---|---|"
    for column, what in enumerate(ways):
        ratios = ", ".join(f"{seconds[column] / seconds[0]:.2f}" for seconds in rounds)
        yield f"| {what} | {median(seconds[column] for seconds in rounds):.3f} | {ratios} |"


def _cached(analyzer: Analyzer, clips: Clips) -> Iterator[str]:
    def ask(**fields: Any) -> JobResult:
        return analyzer.submit(generation=SHORT, **fields).result()

    rounds: list[dict[str, JobResult]] = []
    for _ in range(ROUNDS):
        clip, system = clips.draw(), {"role": "system", "content": f"{len(rounds)}. {SYSTEM}"}
        said = [system, {"role": "user", "content": [{"type": "video", "uri": clip}]}]
        found = {"a clip that is new": ask(media=clip, prompt=QUESTIONS[0])}
        found["the same clip, asked something else"] = ask(media=clip, prompt=QUESTIONS[1])
        for what in ("a conversation about it, behind a system prompt", "its next question", "the one after"):
            found[what] = ask(messages=said)
            said += [{"role": "assistant", "content": found[what].raw_text}, {"role": "user", "content": QUESTIONS[2]}]
        other = {"role": "user", "content": [{"type": "video", "uri": clips.draw()}]}
        found["a new clip behind the same system prompt"] = ask(messages=[system, other])
        rounds.append(found)
    yield f"Small Keye, one job after another; medians of {ROUNDS} rounds.\n"
    yield "| | tokens read | of them from the cache | first token after, s |"
    yield "|---|---|---|---|"
    for what in rounds[0]:
        usages = [found[what].usage for found in rounds]
        read, cached = (median(getattr(usage, name) for usage in usages) for name in ("prompt_tokens", "cached_tokens"))
        firsts = [first for found in rounds if (first := found[what].timings.first_token) is not None]
        yield f"| {what} | {read:.0f} | {cached:.0f} | {median(firsts):.3f} |"


def _refused() -> Iterator[str]:
    seconds = {}
    for what, (make, _) in REFUSED.items():
        schema = make()
        seconds[what] = median(_seconds(partial(_check, schema)) for _ in range(ROUNDS))
    yield f"What is refused when it is sent: {len(seconds)} schemas, medians of {ROUNDS} times, the longest first.\n"
    yield "| `response_schema` | ms |"
    yield "|---|---|"
    for what in sorted(seconds, key=lambda what: -seconds[what])[:5]:
        yield f"| {what} | {1000 * seconds[what]:.1f} |"
    usual = median(_seconds(partial(_check, schema)) for schema in SCHEMAS.values())
    yield f"| taken: one of those below | {1000 * usual:.1f} |"


def _check(schema: Any) -> None:
    _fault_of.cache_clear()
    with suppress(InvalidJob):
        build_job({"prompt": "?", "response_schema": schema})


def _steps(folder: Path) -> Iterator[str]:
    yield f"Steps at batch 16, greedy and one torch thread; {ROUNDS} rounds in turns, the same prompts and lengths.\n"
    yield "| | free, ms | that fit, ms | ratio, of each round |"
    yield "|---|---|---|---|"
    for what, checkpoint in (("small Keye", SMALL_KEYE), ("its layers before 151,936 tokens", _wide(folder / "wide"))):
        processor = KeyeProcessor.from_checkpoint(checkpoint)
        vocabulary = Vocabulary.of(processor)
        # Free answers are as long as they are asked to be.
        processor.eos_token_ids = ()
        engine = Engine(load_model(checkpoint, dtype=torch.float32), processor, kv_cache_bytes=2**28)
        engine.start()
        try:
            for name, schema in LONG.items():
                yield f"| {what}: {name} | {_compare(engine, processor, vocabulary, schema)} |"
        finally:
            engine.stop()


def _compare(engine: Engine, processor: KeyeProcessor, vocabulary: Vocabulary, schema: Any) -> str:
    prompts = [
        processor.prepare([{"role": "user", "content": f"{number}?"}], thinking="no_think") for number in range(16)
    ]
    constraint = Constraint(schema, "no_think", vocabulary, MOST)

    def fitting() -> tuple[float, list[int]]:
        return _step(engine, [(prompt, SamplingOptions(MOST), constraint.copy()) for prompt in prompts])

    _, lengths = fitting()
    assert min(lengths) > 100, lengths
    free = [(prompt, SamplingOptions(most), None) for prompt, most in zip(prompts, lengths, strict=True)]
    rounds = [(_step(engine, free)[0], fitting()[0]) for _ in range(ROUNDS)]
    both = (f"{1000 * median(column):.2f}" for column in zip(*rounds, strict=True))
    return " | ".join([*both, ", ".join(f"{after / before:.2f}" for before, after in rounds)])


def _step(
    engine: Engine, jobs: list[tuple[PreparedPrompt, SamplingOptions, Constraint | None]]
) -> tuple[float, list[int]]:
    """Seconds of a step, and how many tokens each of the jobs came to."""
    before = engine.snapshot()
    pending = [engine.inbox.submit(prompt, options, constraint=constraint) for prompt, options, constraint in jobs]
    for each in pending:
        for _ in each.deltas():
            pass
    after = engine.snapshot()
    seconds = (after.step_seconds - before.step_seconds) / (after.steps - before.steps)
    return seconds, [len(each.generated.token_ids) for each in pending]


def _wide(folder: Path) -> Path:
    """The small Keye with random weights and as many tokens as the released ones have."""
    shutil.copytree(SMALL_KEYE, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"] | {each["content"]: each["id"] for each in tokenizer["added_tokens"]}
    letters, chance = [token for token in vocabulary if len(token) == 1], random.Random(0)
    while len(vocabulary) < NUM_TOKENS:
        vocabulary.setdefault("".join(chance.choices(letters, k=chance.randint(2, 10))), len(vocabulary))
    tokenizer["model"]["vocab"] = vocabulary
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": NUM_TOKENS}
    (folder / "config.json").write_text(json.dumps(config))
    KeyeForConditionalGeneration(KeyeConfig.from_pretrained(folder)).save_pretrained(folder)
    return folder


def _valid(analyzer: Analyzer, folder: Path) -> Iterator[str]:
    pictures = []
    for number in range(JOBS_EACH):
        pictures.append(str(folder / f"{number}.png"))
        draw_image_scene(np.random.default_rng(number)).image.save(pictures[-1])
    yield f"{JOBS_EACH} jobs of each kind, every other one greedy, at most 64 tokens, checked with `jsonschema`.\n"
    yield f"| valid, of {JOBS_EACH} | {' | '.join(Thinking)} |"
    yield f"|---|{'---|' * len(Thinking)}"
    for what, schema in SCHEMAS.items():
        counts = []
        for mode in Thinking:
            jobs = analyzer.submit_many(
                {
                    "media": picture,
                    "prompt": "What is in the image?",
                    "thinking": mode,
                    "response_schema": schema,
                    "generation": {"max_new_tokens": 64, "temperature": number % 2, "seed": number},
                }
                for number, picture in enumerate(pictures)
            )
            ends = [end for _, end in analyzer.results(jobs)]
            counts.append(sum(isinstance(end, JobResult) and _is_valid(schema, end) for end in ends))
        yield f"| {what} | {' | '.join(map(str, counts))} |"


def _is_valid(schema: Any, result: JobResult) -> bool:
    try:
        assert_fits(schema, result.answer)
    except (AssertionError, ValidationError):
        return False
    return result.parsed == (json.loads(result.answer) if isinstance(schema, dict) else result.answer)


def _seconds(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began
