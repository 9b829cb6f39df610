"""Draws the scenes the small Keye is trained and tested on. Pure functions of a random generator; no torch.

    scene = draw_image_scene(np.random.default_rng(7))
    scene.image, scene.questions[0].text, scene.questions[0].answer

Training draws from generators seeded with several integers, so a scene from `default_rng(n)` is one it never saw.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from PIL import Image, ImageDraw

from keye.worker.demo.questions import (
    CELLS,
    DIRECTIONS,
    Cell,
    Direction,
    Question,
    image_questions,
    images_questions,
    video_questions,
)
from keye.worker.demo.shapes import BACKGROUNDS, COLOURS, KINDS, RGB, RGB_OF, Background, Colour, Shape

Size = tuple[int, int]
"""Width and height in pixels."""

IMAGE_SIZE: Size = (112, 112)
VIDEO_SIZE: Size = (84, 84)
_SUPERSAMPLING = 3
_MAX_COLOUR_SHIFT = 14
_MAX_TILT = 0.12


@dataclass(frozen=True)
class ImageScene:
    """One to three shapes, each in its own of six cells."""

    shapes: tuple[tuple[Cell, Shape], ...]
    background: Background
    size: Size
    paints: tuple[RGB, ...]
    questions: tuple[Question, ...]

    @cached_property
    def image(self) -> Image.Image:
        """The scene as an RGB image of `size`."""
        return _paint([shape for _, shape in self.shapes], self.paints[1:], self.paints[0], self.size)


@dataclass(frozen=True)
class VideoScene:
    """One shape that moves in a straight line, or stays and becomes another colour, for `seconds`."""

    shape: Shape
    event: Direction | Colour
    travel: tuple[float, float]
    last_colour: Colour
    changes_at: float
    background: Background
    size: Size
    seconds: float
    paints: tuple[RGB, RGB, RGB]
    questions: tuple[Question, ...]

    def frames(self, fps: float = 2.0) -> np.ndarray:
        """The clip at a frame rate: uint8 [frames, height, width, 3], the first frame at 0 s."""
        times = np.arange(round(self.seconds * fps)) / fps
        return np.stack([np.asarray(self.frame(time)) for time in times])

    def frame(self, time: float) -> Image.Image:
        """What is to be seen at `time` seconds."""
        background, before, after = self.paints
        return _paint([self.shape_at(time)], [before if time < self.changes_at else after], background, self.size)

    def shape_at(self, time: float) -> Shape:
        """The shape where it is at `time` seconds, in the colour it then has."""
        x, y = (start + way * time / self.seconds for start, way in zip(self.shape.centre, self.travel, strict=True))
        return replace(
            self.shape, centre=(x, y), colour=self.shape.colour if time < self.changes_at else self.last_colour
        )


def draw_image_scene(rng: np.random.Generator, size: Size = IMAGE_SIZE, num_shapes: int | None = None) -> ImageScene:
    """One to three shapes on a plain background. `size` changes only how it is painted."""
    width, height = size
    num_shapes = num_shapes or int(rng.choice(3, p=(0.25, 0.35, 0.4))) + 1
    cells = [CELLS[i] for i in sorted(rng.choice(len(CELLS), num_shapes, replace=False))]
    colours = [COLOURS[i] for i in rng.choice(len(COLOURS), num_shapes, replace=False)]
    background = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    shapes = []
    for cell, colour in zip(cells, colours, strict=True):
        row, column = divmod(CELLS.index(cell), 3)
        radius = rng.uniform(0.74, 0.96) * min(width / 3, height / 2) / 2
        stretch = rng.uniform(0.94, 1.06)
        radii = radius * stretch / width, radius / stretch / height
        play = [max(0.02, side / 2 - r) for side, r in zip((1 / 3, 1 / 2), radii, strict=True)]
        x = (column + 0.5) / 3 + rng.uniform(-0.8, 0.8) * play[0]
        y = (row + 0.5) / 2 + rng.uniform(-0.8, 0.8) * play[1]
        kind = KINDS[rng.integers(len(KINDS))]
        shapes.append((cell, Shape(kind, colour, (x, y), radii, rng.uniform(-_MAX_TILT, _MAX_TILT))))
    paints = tuple(_shifted(rng, name) for name in (background, *colours))
    return ImageScene(tuple(shapes), background, size, paints, image_questions(rng, shapes, background))


def draw_images(rng: np.random.Generator, sizes: Sequence[Size]) -> tuple[list[ImageScene], tuple[Question, ...]]:
    """Scenes of one shape, two or three for a single prompt, and questions that tell the images apart."""
    scenes = [draw_image_scene(rng, size, num_shapes=1) for size in sizes]
    return scenes, images_questions([scene.shapes[0][1] for scene in scenes])


def draw_video_scene(rng: np.random.Generator, size: Size = VIDEO_SIZE) -> VideoScene:
    """A shape that moves (three of five) or becomes another colour, for two to four seconds."""
    width, height = size
    seconds = int(rng.integers(4, 9)) / 2
    first, second = (COLOURS[i] for i in rng.choice(len(COLOURS), 2, replace=False))
    background = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    radius = rng.uniform(0.13, 0.2) * min(size)
    radii = radius / width, radius / height
    free = 1 - 2 * radii[0], 1 - 2 * radii[1]
    x, y = (r + rng.uniform(0.05, 0.95) * room for r, room in zip(radii, free, strict=True))
    event: Direction | Colour = second
    travel = (0.0, 0.0)
    if rng.random() < 0.6:
        event, second = DIRECTIONS[rng.integers(len(DIRECTIONS))], first
        drift = rng.uniform(-0.03, 0.03)
        if event in ("left", "right"):
            x, way = _track(rng, radii[0], free[0], forward=event == "right")
            travel = way, drift
        else:
            y, way = _track(rng, radii[1], free[1], forward=event == "down")
            travel = drift, way
    shape = Shape(KINDS[rng.integers(len(KINDS))], first, (x, y), radii, rng.uniform(-_MAX_TILT, _MAX_TILT))
    before = _shifted(rng, first)
    paints = _shifted(rng, background), before, before if second == first else _shifted(rng, second)
    return VideoScene(
        shape=shape,
        event=event,
        travel=travel,
        last_colour=second,
        changes_at=seconds * rng.uniform(0.3, 0.65),
        background=background,
        size=size,
        seconds=seconds,
        paints=paints,
        questions=video_questions(shape, event),
    )


def _track(rng: np.random.Generator, radius: float, free: float, forward: bool) -> tuple[float, float]:
    """Where on its axis a shape starts and how far it goes, at least 60 % of the room it has."""
    length = rng.uniform(0.6, 0.95) * free
    start = radius + rng.uniform(0, free - length)
    return (start, length) if forward else (start + length, -length)


def _shifted(rng: np.random.Generator, name: str) -> RGB:
    """The colour of that name, a little off, as lamps and cameras make it."""
    shift = rng.integers(-_MAX_COLOUR_SHIFT, _MAX_COLOUR_SHIFT + 1, 3)
    red, green, blue = (int(c) for c in np.clip(np.add(RGB_OF[name], shift), 0, 255))
    return red, green, blue


def _paint(shapes: list[Shape], paints: tuple[RGB, ...] | list[RGB], background: RGB, size: Size) -> Image.Image:
    large = (size[0] * _SUPERSAMPLING, size[1] * _SUPERSAMPLING)
    image = Image.new("RGB", large, background)
    canvas = ImageDraw.Draw(image)
    for shape, paint in zip(shapes, paints, strict=True):
        shape.paint(canvas, large, paint)
    return image.reduce(_SUPERSAMPLING)
