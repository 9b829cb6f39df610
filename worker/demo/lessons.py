"""Turns scenes into training batches: one row a prompt, several questions behind the same media. Trains nothing.

A row is `prefix | question, reply | question, reply | ...` with a block mask: each question sees the prefix and itself,
so it learns exactly what it would in a prompt of its own while the media are encoded once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer
from torch import Tensor

from worker.demo.questions import CELLS, Cell, Question, Thinking, counting_question
from worker.demo.scenes import ImageScene, Size, draw_image_scene, draw_images, draw_video_scene
from worker.demo.shapes import BACKGROUNDS, COLOURS, KINDS, Background, Shape
from worker.demo.tokenizer import SUFFIXES
from worker.demo.wear import Wear, draw_wear
from worker.model.image_processing import ImageProcessor, Patches
from worker.model.positions import position_ids
from worker.model.visual_input import Image as ImageInput
from worker.model.visual_input import Video

NUM_SIGHTS = len(KINDS) * len(COLOURS) + len(BACKGROUNDS)
"""What a visual token can show: one of the coloured shapes, or plain background."""

IGNORED = -100
_TOKEN_PIXELS = 28
_MIN_SHARE = 0.15  # of a visual token that a shape must cover to count as what the token shows
_IMAGE_SIZES: tuple[Size, ...] = (
    (112, 112),
    (84, 84),
    (112, 84),
    (84, 112),
    (140, 84),
    (168, 168),
    (224, 224),
    (160, 120),
)
_IMAGE_SHARES = (0.4, 0.08, 0.1, 0.08, 0.08, 0.08, 0.12, 0.06)
_VIDEO_SIZES: tuple[Size, ...] = ((84, 84), (112, 112), (112, 84), (168, 168), (224, 224), (160, 120))
_VIDEO_SHARES = (0.5, 0.22, 0.08, 0.07, 0.06, 0.07)
_MODES: tuple[Thinking, ...] = ("auto", "think", "no_think")
_MODE_SHARES = (0.3, 0.25, 0.45)


@dataclass(frozen=True)
class Item:
    """An image or the frames of a video as patches, and what each of its visual tokens shows."""

    pixel_values: Tensor
    grid: tuple[int, int, int]
    sights: Tensor
    cells: Tensor


@dataclass(frozen=True)
class Lesson:
    """Media of one prompt with the questions asked about them. `fps` is that of a video, None for images."""

    items: Sequence[Item]
    questions: Sequence[Question]
    fps: float | None = None


@dataclass(frozen=True)
class Batch:
    """B rows of L tokens. `asked` numbers the question a target belongs to; `kinds` names each of these."""

    input_ids: Tensor  # int64 [B, L]
    position_ids: Tensor  # int64 [3, B, L]
    attention_mask: Tensor  # bool [B, 1, L, L]
    targets: Tensor  # int64 [B, L], IGNORED where nothing is learnt
    asked: Tensor  # int64 [B, L]
    kinds: Sequence[str]
    items: Sequence[Item]

    @cached_property
    def weights(self) -> Tensor:
        """Float [targets]: a long reply counts more than a short one, but not as many times as it is longer."""
        asked = self.asked[self.targets != IGNORED]
        return torch.bincount(asked, minlength=len(self.kinds))[asked] ** -0.5


class Teacher:
    """Draws lessons and packs them. `shares` weighs the kinds of questions, 1.0 where not named."""

    def __init__(self, tokenizer: Tokenizer, image_processor: ImageProcessor, shares: dict[str, float]) -> None:
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.shares = shares
        self.image_token_id = tokenizer.token_to_id("<|image_pad|>")
        self.video_token_id = tokenizer.token_to_id("<|video_pad|>")

    def image_batch(self, rng: np.random.Generator, num_rows: int, num_questions: int = 5) -> Batch:
        """Rows about one image; every eighth is about two or three."""
        lessons = [self.images_lesson(rng) if row % 8 == 7 else self.image_lesson(rng) for row in range(num_rows)]
        return self.pack(rng, lessons, num_questions)

    def video_batch(self, rng: np.random.Generator, num_rows: int, num_questions: int = 4) -> Batch:
        """Rows about one video each."""
        return self.pack(rng, [self.video_lesson(rng) for _ in range(num_rows)], num_questions)

    def counting_batch(self, rng: np.random.Generator, num_rows: int) -> Batch:
        """Rows without media that count up to a number of at most 100."""
        questions = [counting_question(int(rng.integers(2, 101))) for _ in range(num_rows)]
        return self.pack(rng, [Lesson((), (question,)) for question in questions], 1)

    def image_lesson(self, rng: np.random.Generator) -> Lesson:
        """One image of one to three shapes."""
        scene = draw_image_scene(rng, _IMAGE_SIZES[rng.choice(len(_IMAGE_SIZES), p=_IMAGE_SHARES)])
        return Lesson([self._image_item(scene, draw_wear(rng))], scene.questions)

    def images_lesson(self, rng: np.random.Generator) -> Lesson:
        """Two or three images of one shape each."""
        scenes, questions = draw_images(rng, _IMAGE_SIZES[rng.choice(len(_IMAGE_SIZES), p=_IMAGE_SHARES)])
        wear = draw_wear(rng)
        return Lesson([self._image_item(scene, wear) for scene in scenes], questions)

    def video_lesson(self, rng: np.random.Generator) -> Lesson:
        """One video, mostly two frames a second, sampled a little off the beat as real samplers do."""
        scene = draw_video_scene(rng, _VIDEO_SIZES[rng.choice(len(_VIDEO_SIZES), p=_VIDEO_SHARES)])
        fps = 2.0 if rng.random() < 0.7 else float(rng.uniform(1.4, 3.2))
        num_frames = max(2, round(scene.seconds * fps))
        times = np.linspace(0, scene.seconds * (1 - rng.uniform(0.02, 1) / num_frames), num_frames)
        wear = draw_wear(rng)
        frames = np.stack([np.asarray(wear(scene.frame(time))) for time in times])
        patches = self.image_processor.process_video(Video(frames, fps))
        shapes = [[(None, scene.shape_at(time))] for time in times]
        return Lesson([_item(patches, shapes, scene.background)], scene.questions, fps)

    def _image_item(self, scene: ImageScene, wear: Wear) -> Item:
        patches = self.image_processor.process_image(ImageInput(wear(scene.image)))
        return _item(patches, [scene.shapes], scene.background)

    def pack(self, rng: np.random.Generator, lessons: Sequence[Lesson], num_questions: int) -> Batch:
        """One row a lesson, padded on the right to the longest."""
        kinds: list[str] = []
        rows = [self._row(rng, lesson, num_questions, kinds) for lesson in lessons]
        length = max(row.shape[1] for row in rows)
        table = torch.stack([torch.nn.functional.pad(row, (0, length - row.shape[1])) for row in rows], dim=1)
        input_ids, targets, asked, block, *positions = table
        is_seen = (block.unsqueeze(1) == 1) | (block.unsqueeze(1) == block.unsqueeze(2))
        return Batch(
            input_ids=input_ids,
            position_ids=torch.stack(positions),
            attention_mask=(is_seen & torch.ones(length, length, dtype=torch.bool).tril()).unsqueeze(1),
            # Zero is padding in all rows of the table, so numbers are stored one higher there.
            targets=torch.where(targets > 0, targets - 1, IGNORED),
            asked=asked - 1,
            kinds=kinds,
            items=[item for lesson in lessons for item in lesson.items],
        )

    def _row(self, rng: np.random.Generator, lesson: Lesson, num_questions: int, kinds: list[str]) -> Tensor:
        """int64 [7, length]: token, target + 1, question + 1, block (1: prefix), and three rows of positions."""
        pad = "<|image_pad|>" if lesson.fps is None else "<|video_pad|>"
        media = [f"<|vision_start|>{pad * len(item.sights)}<|vision_end|>" for item in lesson.items]
        prefix = self._encode("<|im_start|>user\n" + "".join(media))
        grids = [item.grid for item in lesson.items]
        positions, delta = position_ids(
            torch.tensor(prefix),
            image_token_id=self.image_token_id,
            video_token_id=self.video_token_id,
            image_grids=grids if lesson.fps is None else (),
            video_grids=() if lesson.fps is None else grids,
            seconds_per_frame=None if lesson.fps is None else [1 / lesson.fps],
        )
        nothing = torch.zeros(len(prefix), dtype=torch.long)
        blocks = [torch.stack([torch.tensor(prefix), nothing, nothing, nothing + 1, *positions])]
        for block, question in enumerate(self._choose(rng, lesson.questions, num_questions), start=2):
            kinds.append(question.kind)
            mode = _MODES[rng.choice(len(_MODES), p=_MODE_SHARES)]
            asks = self._encode(f"{question.text}{SUFFIXES[mode]}<|im_end|>\n<|im_start|>assistant\n")
            replies = self._encode(f"{question.reply(mode)}<|im_end|>")
            tokens = torch.tensor(asks + replies[:-1])
            targets = torch.tensor([0] * (len(asks) - 1) + [token + 1 for token in replies])
            position = torch.arange(len(tokens)) + len(prefix) + delta
            asked = (targets > 0) * len(kinds)
            blocks.append(torch.stack([tokens, targets, asked, torch.full_like(tokens, block), *[position] * 3]))
        return torch.cat(blocks, dim=1)

    def _choose(self, rng: np.random.Generator, questions: Sequence[Question], number: int) -> list[Question]:
        shares = np.array([self.shares.get(question.kind, 1.0) for question in questions])
        chosen = rng.choice(len(questions), min(number, len(questions)), replace=False, p=shares / shares.sum())
        return [questions[i] for i in chosen]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text).ids
        return ids


def _item(patches: Patches, shapes: Sequence[Sequence[tuple[Cell | None, Shape]]], background: Background) -> Item:
    """The patches of one item with, per visual token, the shape that covers most of it."""
    (grid,) = patches.grids
    size = grid[2] * _TOKEN_PIXELS // 2, grid[1] * _TOKEN_PIXELS // 2
    sights, cells = zip(*(_shown(frame, background, size) for frame in shapes), strict=True)
    return Item(torch.from_numpy(patches.values), grid, torch.cat(sights), torch.cat(cells))


def _shown(shapes: Sequence[tuple[Cell | None, Shape]], background: Background, size: Size) -> tuple[Tensor, Tensor]:
    """int64 [tokens] twice: what each visual token of a frame shows, and the cell that shape is in (or IGNORED)."""
    width, height = size
    canvas = Image.new("L", size)
    for number, (_, shape) in enumerate(shapes, start=1):
        shape.paint(ImageDraw.Draw(canvas), size, number)
    blocks = np.asarray(canvas).reshape(height // _TOKEN_PIXELS, _TOKEN_PIXELS, width // _TOKEN_PIXELS, _TOKEN_PIXELS)
    shares = np.stack([(blocks == number).mean(axis=(1, 3)).ravel() for number in range(1, len(shapes) + 1)])
    winner = np.where(shares.max(axis=0) > _MIN_SHARE, shares.argmax(axis=0), len(shapes))
    sights = [KINDS.index(s.kind) * len(COLOURS) + COLOURS.index(s.colour) for _, s in shapes]
    sights.append(len(KINDS) * len(COLOURS) + BACKGROUNDS.index(background))
    cells = [CELLS.index(cell) if cell else IGNORED for cell, _ in shapes] + [IGNORED]
    return torch.tensor(sights)[winner], torch.tensor(cells)[winner]
