"""Coloured shapes and how one is painted. Knows nothing of scenes, questions or language models."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from PIL import ImageDraw

Kind = Literal["circle", "square", "triangle", "star"]
Colour = Literal["red", "green", "blue", "yellow", "purple", "orange"]
Background = Literal["white", "grey", "black", "pink"]
RGB = tuple[int, int, int]

KINDS: tuple[Kind, ...] = get_args(Kind)
COLOURS: tuple[Colour, ...] = get_args(Colour)
BACKGROUNDS: tuple[Background, ...] = get_args(Background)

RGB_OF: dict[str, RGB] = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (38, 84, 214),
    "yellow": (245, 211, 47),
    "purple": (136, 58, 178),
    "orange": (244, 128, 26),
    "white": (245, 245, 245),
    "grey": (150, 150, 150),
    "black": (20, 20, 20),
    "pink": (246, 190, 205),
}


def _ring(corners: int, inner: float = 1.0) -> list[tuple[float, float]]:
    """Corners around the centre, the first at the top; every second one lies at `inner` of the radius."""
    radii = [1.0, inner] * corners
    angles = [2 * math.pi * i / corners for i in range(corners)]
    return [(math.sin(angle) * radius, -math.cos(angle) * radius) for angle, radius in zip(angles, radii, strict=False)]


_OUTLINES: dict[Kind, list[tuple[float, float]]] = {
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": _ring(3),
    "star": _ring(10, inner=0.42),
}


@dataclass(frozen=True)
class Shape:
    """One shape on a canvas whose sides are 1, so that it can be painted at any size.

    `centre` is (x, y) from the top left; `radii` are fractions of the width and of the height; `tilt` is in radians.
    """

    kind: Kind
    colour: Colour
    centre: tuple[float, float]
    radii: tuple[float, float]
    tilt: float = 0.0

    def paint(self, canvas: ImageDraw.ImageDraw, size: tuple[int, int], fill: RGB | int) -> None:
        """Fill the shape on a canvas of `size` (width, height) pixels."""
        width, height = size
        x, y = self.centre[0] * width, self.centre[1] * height
        rx, ry = self.radii[0] * width, self.radii[1] * height
        if self.kind == "circle":
            canvas.ellipse((x - rx, y - ry, x + rx, y + ry), fill=fill)
            return
        cos, sin = math.cos(self.tilt), math.sin(self.tilt)
        corners = [(x + rx * (u * cos - v * sin), y + ry * (u * sin + v * cos)) for u, v in _OUTLINES[self.kind]]
        canvas.polygon(corners, fill=fill)
