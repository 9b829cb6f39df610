"""Draws lessons: media as the model takes them, questions, what each visual token shows. Packs no batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from keye.worker.demo.questions import Question, Thinking
from keye.worker.demo.scenes import ImageScene, Size, draw_image_scene, draw_images, draw_video_scene
from keye.worker.demo.shapes import BACKGROUNDS, COLOURS, KINDS, Background, Shape
from keye.worker.model.image_processing import Image as ImageInput
from keye.worker.model.image_processing import ImageProcessor, Patches, Video
from tools.small_keye.wear import Wear, draw_wear

NUM_SHAPE_SIGHTS = len(KINDS) * len(COLOURS)
NUM_SIGHTS = NUM_SHAPE_SIGHTS + len(BACKGROUNDS)
"""What a visual token can show: one of the coloured shapes, or plain background."""

NUM_PLACES = 6
IGNORED = -100
_TOKEN_PIXELS = 28
_MIN_SHARE = 0.15  # of a visual token that a shape must cover to count as what the token shows
_CONVERSATION_SHARE = 0.12
_NUM_QUESTIONS = 5

T = TypeVar("T")
Shares = Sequence[tuple[T, float]]

_MODES: Shares[Thinking] = (("auto", 0.3), ("think", 0.25), ("no_think", 0.45))
_IMAGE_SIZES: Shares[Size] = (
    ((112, 112), 0.4),
    ((84, 84), 0.08),
    ((112, 84), 0.1),
    ((84, 112), 0.08),
    ((140, 84), 0.08),
    ((160, 120), 0.06),
    ((168, 168), 0.08),
    ((224, 224), 0.12),
)
_VIDEO_SIZES: Shares[Size] = (
    ((84, 84), 0.5),
    ((112, 112), 0.22),
    ((112, 84), 0.08),
    ((160, 120), 0.07),
    ((168, 168), 0.07),
    ((224, 224), 0.06),
)


@dataclass(frozen=True)
class Item:
    """An image or the frames of a video as patches uint8 [t*h*w, 3, 14, 14] of a grid (t, h, w)."""

    pixel_values: Tensor
    grid: tuple[int, int, int]
    sights: Tensor
    """int64 [t*h*w/4]: what each visual token shows"""
    places: Tensor
    """int64 [t*h*w/4, 2]: column and row of that shape's centre among NUM_PLACES each, IGNORED where there is none"""


@dataclass(frozen=True)
class Lesson:
    """Media of one prompt with the questions about them, each in a thinking mode.

    `fps` is that of a video, None for images. The questions are prompts of their own, or one conversation.
    """

    items: Sequence[Item]
    asks: Sequence[tuple[Question, Thinking]]
    fps: float | None = None
    is_conversation: bool = False


class Teacher:
    """Draws lessons. `shares` says how often kinds of questions are asked, 1.0 where not named."""

    def __init__(self, image_processor: ImageProcessor, shares: dict[str, float]) -> None:
        self.image_processor = image_processor
        self.shares = shares

    def image_lesson(self, rng: np.random.Generator) -> Lesson:
        """One image of one to three shapes."""
        scene = draw_image_scene(rng, _drawn(rng, _IMAGE_SIZES))
        return self._lesson(rng, [self._image_item(scene, draw_wear(rng))], scene.questions)

    def images_lesson(self, rng: np.random.Generator) -> Lesson:
        """Two or three images of one shape each."""
        scenes, questions = draw_images(rng, [_drawn(rng, _IMAGE_SIZES) for _ in range(rng.integers(2, 4))])
        return self._lesson(rng, [self._image_item(scene, draw_wear(rng)) for scene in scenes], questions)

    def video_lesson(self, rng: np.random.Generator) -> Lesson:
        """One video, mostly two frames a second, sampled a little off the beat as real samplers do."""
        scene = draw_video_scene(rng, _drawn(rng, _VIDEO_SIZES))
        fps = 2.0 if rng.random() < 0.7 else float(rng.uniform(1.4, 3.2))
        num_frames = round(scene.seconds * fps)
        times = np.linspace(0, scene.seconds * (1 - rng.uniform(0.02, 1) / num_frames), num_frames)
        wear = draw_wear(rng)
        frames = np.stack([np.asarray(wear(scene.frame(time))) for time in times])
        patches = self.image_processor.process_video(Video(frames, fps))
        shapes = [[scene.shape_at(time)] for time in times]
        return self._lesson(rng, [_item(patches, shapes, scene.background)], scene.questions, fps)

    def _lesson(
        self, rng: np.random.Generator, items: Sequence[Item], questions: Sequence[Question], fps: float | None = None
    ) -> Lesson:
        shares = np.array([self.shares.get(question.kind, 1.0) for question in questions])
        num_questions = min(_NUM_QUESTIONS, len(questions))
        chosen = rng.choice(len(questions), num_questions, replace=False, p=shares / shares.sum())
        asks = [(questions[i], _drawn(rng, _MODES)) for i in chosen]
        return Lesson(items, asks, fps, is_conversation=rng.random() < _CONVERSATION_SHARE)

    def _image_item(self, scene: ImageScene, wear: Wear) -> Item:
        patches = self.image_processor.process_image(ImageInput(wear(scene.image)))
        return _item(patches, [[shape for _, shape in scene.shapes]], scene.background)


def _item(patches: Patches, shapes: Sequence[Sequence[Shape]], background: Background) -> Item:
    """`shapes` are those of each frame."""
    (grid,) = patches.grids
    size = grid[2] * _TOKEN_PIXELS // 2, grid[1] * _TOKEN_PIXELS // 2
    sights, places = zip(*(_shown(frame, background, size) for frame in shapes), strict=True)
    return Item(torch.from_numpy(patches.values), grid, torch.cat(sights), torch.cat(places))


def _shown(shapes: Sequence[Shape], background: Background, size: Size) -> tuple[Tensor, Tensor]:
    """What each visual token of a frame shows, the shape that covers most of it, and where that shape is."""
    width, height = size
    canvas = Image.new("L", size)
    for number, shape in enumerate(shapes, start=1):
        shape.paint(ImageDraw.Draw(canvas), size, number)
    blocks = np.asarray(canvas).reshape(height // _TOKEN_PIXELS, _TOKEN_PIXELS, width // _TOKEN_PIXELS, _TOKEN_PIXELS)
    shares = np.stack([(blocks == number).mean(axis=(1, 3)).ravel() for number in range(1, len(shapes) + 1)])
    winner = np.where(shares.max(axis=0) > _MIN_SHARE, shares.argmax(axis=0), len(shapes))
    sights = [KINDS.index(shape.kind) * len(COLOURS) + COLOURS.index(shape.colour) for shape in shapes]
    sights.append(NUM_SHAPE_SIGHTS + BACKGROUNDS.index(background))
    places = [[min(max(int(z * NUM_PLACES), 0), NUM_PLACES - 1) for z in shape.centre] for shape in shapes]
    places.append([IGNORED, IGNORED])
    return torch.tensor(sights)[winner], torch.tensor(places)[winner]


def _drawn(rng: np.random.Generator, choices: Shares[T]) -> T:
    return choices[rng.choice(len(choices), p=[share for _, share in choices])][0]
