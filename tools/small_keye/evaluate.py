"""Measures the small Keye: `python -m tools.small_keye.evaluate`. Exits 1 below 95 % right replies.

Scenes come from seeds that training never saw, about half of them worn as files are, and go through the real processor
and `generate` in left-padded batches. A reply is right if its whole text is: answer, thoughts and tags, to the letter.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from keye.config.codes import PrecisionSetting
from keye.worker.demo.local_worker import SMALL_KEYE
from keye.worker.demo.questions import Question, Thinking
from keye.worker.demo.scenes import IMAGE_SIZE, Size, draw_image_scene, draw_images, draw_video_scene
from keye.worker.model.image_processing import Image, Video
from keye.worker.model.keye import KeyeForConditionalGeneration
from keye.worker.model.load import load_model
from keye.worker.model.precision import choose_precision
from keye.worker.model.processor import KeyeProcessor
from tools.small_keye.wear import draw_wear

FIRST_SEED = 1_000_000
REQUIRED_SHARE = 0.95
_BATCH_SIZE = 48
_MAX_NEW_TOKENS = 96
_SIZES: tuple[Size, ...] = ((112, 112), (84, 112), (224, 224), (168, 168), (112, 84))
_THINKING: tuple[Thinking, ...] = ("auto", "think", "no_think")


@dataclass(frozen=True)
class Exam:
    """One question about media the model has not seen."""

    question: Question
    thinking: Thinking
    images: Sequence[Image]
    videos: Sequence[Video]

    @property
    def expected(self) -> str:
        """The reply that counts as right."""
        return self.question.reply(self.thinking)


def draw_exams(seed: int) -> Iterator[Exam]:
    """One scene of that seed and three questions about it, one in each thinking mode."""
    rng = np.random.default_rng(seed)
    images, videos, questions = _draw_media(rng)
    for thinking, index in zip(_THINKING, rng.permutation(len(questions)), strict=False):
        yield Exam(questions[index], thinking, images, videos)


def ask(model: KeyeForConditionalGeneration, processor: KeyeProcessor, exams: Sequence[Exam]) -> list[str]:
    """The model's greedy replies, all exams in one batch."""
    prompts = []
    for exam in exams:
        media = [{"type": "image"} for _ in exam.images] + [{"type": "video"} for _ in exam.videos]
        messages = [{"role": "user", "content": [*media, {"type": "text", "text": exam.question.text}]}]
        prompts.append(processor.prepare(messages, exam.images, exam.videos, exam.thinking))
    batch = processor.pad_left(prompts)
    tokens = model.generate(**batch, max_new_tokens=_MAX_NEW_TOKENS)
    return processor.tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def evaluate(
    folder: Path, num_scenes: int, first_seed: int, precision: PrecisionSetting = "float32"
) -> list[tuple[Exam, str]]:
    """Every exam of the scenes with what the checkpoint in `folder` replies, on the CPU."""
    chosen = choose_precision(precision, torch.device("cpu"))
    model = load_model(folder, dtype=chosen.dtype, quantization=chosen.quantization)
    processor = KeyeProcessor.from_checkpoint(folder)
    exams = [exam for seed in range(first_seed, first_seed + num_scenes) for exam in draw_exams(seed)]
    # Prompts of like length side by side: less padding, and images do not wait for videos.
    exams.sort(key=lambda exam: (len(exam.videos), len(exam.images), exam.thinking))
    batches = [exams[start : start + _BATCH_SIZE] for start in range(0, len(exams), _BATCH_SIZE)]
    return [pair for batch in batches for pair in zip(batch, ask(model, processor, batch), strict=True)]


def share_right(results: Sequence[tuple[Exam, str]]) -> float:
    """The share of replies that are right to the letter."""
    return sum(said == exam.expected for exam, said in results) / len(results)


def _draw_media(rng: np.random.Generator) -> tuple[list[Image], list[Video], Sequence[Question]]:
    size = _SIZES[rng.integers(len(_SIZES))]
    sort = rng.choice(3, p=(0.55, 0.1, 0.35))
    if sort == 2:
        video = draw_video_scene(rng, size)
        wear = draw_wear(rng)
        frames = [np.asarray(wear(video.frame(time))) for time in np.arange(0, video.seconds, 0.5)]
        return [], [Video(np.stack(frames), fps=2.0)], video.questions
    if sort == 1:
        scenes, questions = draw_images(rng, [size, IMAGE_SIZE])
        return [Image(draw_wear(rng)(scene.image)) for scene in scenes], [], questions
    scene = draw_image_scene(rng, size)
    return [Image(draw_wear(rng)(scene.image))], [], scene.questions


def _print_table(results: Sequence[tuple[Exam, str]]) -> None:
    for title, name_of in (
        ("kind", lambda exam: exam.question.kind),
        ("language", lambda exam: exam.question.language),
        ("thinking", lambda exam: exam.thinking),
    ):
        for name in sorted({name_of(exam) for exam, _ in results}):
            some = [result for result in results if name_of(result[0]) == name]
            print(f"{title:9} {name:15} {share_right(some):6.1%} of {len(some)}")
    print(f"total {share_right(results):.1%} of {len(results)}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the small Keye on scenes it has never seen.")
    parser.add_argument("--checkpoint", type=Path, default=SMALL_KEYE)
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--seed", type=int, default=FIRST_SEED, help="seed of the first scene")
    parser.add_argument("--precision", choices=get_args(PrecisionSetting), default="float32")
    arguments = parser.parse_args()
    results = evaluate(arguments.checkpoint, arguments.scenes, arguments.seed, arguments.precision)
    for exam, said in results:
        if said != exam.expected:
            print(f"{exam.question.text!r} ({exam.thinking}): {said!r}, expected {exam.expected!r}")
    _print_table(results)
    return 0 if share_right(results) >= REQUIRED_SHARE else 1


if __name__ == "__main__":
    sys.exit(main())
