# ruff: noqa: RUF001 - Chinese sentences end in Chinese punctuation
"""Questions about a scene with their right answers, in English and Chinese. Draws nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from keye.worker.demo.shapes import COLOURS, Colour, Shape

T = TypeVar("T")
Thinking = Literal["auto", "think", "no_think"]
Language = Literal["en", "zh"]
Cell = Literal["top left", "top middle", "top right", "bottom left", "bottom middle", "bottom right"]
Direction = Literal["left", "right", "up", "down"]

CELLS: tuple[Cell, ...] = ("top left", "top middle", "top right", "bottom left", "bottom middle", "bottom right")
DIRECTIONS: tuple[Direction, ...] = ("left", "right", "up", "down")
CHINESE: dict[str, str] = {
    "circle": "圆形", "square": "方形", "triangle": "三角形", "star": "星形",
    "red": "红色", "green": "绿色", "blue": "蓝色", "yellow": "黄色", "purple": "紫色", "orange": "橙色",
    "white": "白色", "grey": "灰色", "black": "黑色", "pink": "粉色",
    "top left": "左上方", "top middle": "正上方", "top right": "右上方",
    "bottom left": "左下方", "bottom middle": "正下方", "bottom right": "右下方",
    "left": "向左", "right": "向右", "up": "向上", "down": "向下",
}  # fmt: skip
WAYS: dict[Direction, str] = {"left": "to the left", "right": "to the right", "up": "up", "down": "down"}
ORDINALS = ("first", "second", "third")
_NUMBERS = ("One", "Two", "Three")
_NUMBERS_ZH = ("一个", "两个", "三个")

# Without a suffix the model picks the mode itself: it looks first where it has to find every shape.
_THOUGHT_ABOUT = frozenset({"caption", "count", "video caption"})
_ANALYSIS: dict[tuple[Language, bool], str] = {
    ("en", True): "I have to look closely, so I use /think.",
    ("en", False): "This is simple, so I use /no_think.",
    ("zh", True): "需要仔细看，用 /think。",
    ("zh", False): "这很简单，用 /no_think。",
}


@dataclass(frozen=True)
class Question:
    """One question about a scene; `sight` is what the model says it sees when it thinks."""

    kind: str
    language: Language
    text: str
    answer: str
    sight: str

    def reply(self, thinking: Thinking) -> str:
        """The whole text the model should produce in a thinking mode."""
        thought = f"<think>{self.sight}</think><answer>{self.answer}</answer>"
        if thinking != "auto":
            return thought if thinking == "think" else self.answer
        thinks = self.kind in _THOUGHT_ABOUT
        return f"<analysis>{_ANALYSIS[self.language, thinks]}</analysis>{thought if thinks else self.answer}"


def image_questions(
    rng: np.random.Generator, shapes: Sequence[tuple[Cell, Shape]], background: str
) -> tuple[Question, ...]:
    """Questions about one image. `shapes` are in reading order, no two of one colour."""
    cells = {shape: cell for cell, shape in shapes}
    seen = [shape for _, shape in shapes]
    sight = "; ".join(f"{s.colour} {s.kind}, {cells[s]}" for s in seen) + f"; background {background}"
    sight_zh = "；".join(f"{_zh(s)}，{CHINESE[cells[s]]}" for s in seen) + f"；背景{CHINESE[background]}"
    questions: list[Question] = []

    def ask(kind: str, text: str, answer: str) -> None:
        questions.append(Question(kind, "en", text, answer, sight))

    def ask_zh(kind: str, text: str, answer: str) -> None:
        questions.append(Question(kind, "zh", text, answer, sight_zh))

    text = _one_of(rng, "What is in the image?", "Describe the image.", "What do you see?")
    ask("caption", text, _sentence([_a(s.colour, s.kind) for s in seen]))
    ask_zh("caption", "图里有什么？", _sentence_zh([f"一个{_zh(s)}" for s in seen]))
    text = _one_of(rng, "How many shapes are there?", "How many shapes are in the image?")
    ask("count", text, f"{_NUMBERS[len(seen) - 1]}.")
    ask_zh("count", "有几个图形？", f"{_NUMBERS_ZH[len(seen) - 1]}。")
    ask("background", "What colour is the background?", f"{background.capitalize()}.")
    ask_zh("background", "背景是什么颜色？", f"{CHINESE[background]}。")

    shape = _one_of(rng, *seen)
    ask("shape", f"What shape is {shape.colour}?", f"A {shape.kind}.")
    shape = _one_of(rng, *seen)
    ask("colour", f"What colour is the shape at the {cells[shape]}?", f"{shape.colour.capitalize()}.")
    shape = _one_of(rng, *seen)
    ask_zh("colour", f"{CHINESE[cells[shape]]}的图形是什么颜色？", f"{CHINESE[shape.colour]}。")
    shape = _one_of(rng, *seen)
    ask("where", f"Where is the {shape.colour} {shape.kind}?", f"At the {cells[shape]}.")
    ask_zh("where", f"{_zh(shape)}在哪里？", f"在{CHINESE[cells[shape]]}。")
    ask("what is at", f"What is at the {cells[shape]}?", _sentence([_a(shape.colour, shape.kind)]))
    ask("what is at", f"What is at the {_one_of(rng, *(c for c in CELLS if c not in cells.values()))}?", "Nothing.")
    present = {s.colour for s in seen}
    ask("is there", f"Is there {_a(_one_of(rng, *seen).colour, 'shape')}?", "Yes.")
    absent = [colour for colour in COLOURS if colour not in present]
    ask("is there", f"Is there {_a(_one_of(rng, *absent), 'shape')}?", "No.")
    return tuple(questions)


def images_questions(shapes: Sequence[Shape]) -> tuple[Question, ...]:
    """Questions about two or three images in one prompt, one shape in each."""
    sight = "; ".join(f"{ordinal}: {s.colour} {s.kind}" for ordinal, s in zip(ORDINALS, shapes, strict=False))
    asked = [
        (text.format(where=f"in the {ordinal} image"), answer)
        for ordinal, shape in zip(ORDINALS, shapes, strict=False)
        for text, answer in (
            ("What colour is the shape {where}?", f"{shape.colour.capitalize()}."),
            ("What shape is {where}?", f"A {shape.kind}."),
            ("What is {where}?", _sentence([_a(shape.colour, shape.kind)])),
        )
    ]
    return tuple(Question("several images", "en", text, answer, sight) for text, answer in asked)


def video_questions(shape: Shape, event: Direction | Colour) -> tuple[Question, ...]:
    """Questions about a video in which `shape` moves in a direction or becomes another colour."""
    moves = event in WAYS
    happens = f"moves {WAYS[event]}" if event in WAYS else f"becomes {event}"
    happens_zh = f"{CHINESE[event]}移动" if moves else f"变成{CHINESE[event]}"
    sight, sight_zh = f"{shape.colour} {shape.kind}, {happens}", f"{_zh(shape)}，{happens_zh}"
    way = f"{WAYS[event].capitalize()}." if event in WAYS else "It does not move."
    way_zh = f"{CHINESE[event]}。" if moves else "它不动。"
    caption = f"{_a(shape.colour, shape.kind).capitalize()} {happens}."
    questions = [
        Question("video caption", "en", "What happens in the video?", caption, sight),
        Question("video caption", "en", "Describe the video.", caption, sight),
        Question("video caption", "zh", "视频里发生了什么？", f"一个{_zh(shape)}{happens_zh}。", sight_zh),
        Question("which way", "en", "Which way does the shape move?", way, sight),
        Question("which way", "en", f"Which way does the {shape.kind} move?", way, sight),
        Question("which way", "zh", "它往哪个方向移动？", way_zh, sight_zh),
        Question("video shape", "en", "What shape is in the video?", f"A {shape.kind}.", sight),
    ]
    if not moves:
        become = "Which colour does it become?", f"Which colour does the {shape.kind} become?"
        questions += [Question("becomes", "en", text, f"{event.capitalize()}.", sight) for text in become]
        questions.append(Question("becomes", "zh", "它变成什么颜色？", f"{CHINESE[event]}。", sight_zh))
    return tuple(questions)


def _one_of(rng: np.random.Generator, *choices: T) -> T:
    return choices[rng.integers(len(choices))]


def _a(colour: Colour, thing: str) -> str:
    return f"{'an' if colour == 'orange' else 'a'} {colour} {thing}"


def _zh(shape: Shape) -> str:
    return CHINESE[shape.colour] + CHINESE[shape.kind]


def _sentence(things: list[str]) -> str:
    *most, last = things
    text = f"{', '.join(most)} and {last}" if most else last
    return f"{text[0].upper()}{text[1:]}."


def _sentence_zh(things: list[str]) -> str:
    *most, last = things
    return f"{'、'.join(most)}和{last}。" if most else f"{last}。"
