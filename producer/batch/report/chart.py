"""The charts of a page about a batch, drawn as SVG: bars over time, and over how long answers took."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple
from xml.etree.ElementTree import Element

from keye.producer.batch.report.markup import element

_WIDTH, _HEIGHT = 460, 246
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 448, 40, 202
_MAX_TICKS = 5


class Bar(NamedTuple):
    """What ended `start` to `end` on the chart's axis: how many were answered, and how many failed."""

    start: float
    end: float
    answered: int
    failed: int = 0


class Mark(NamedTuple):
    """A place on the axis that is worth a word."""

    at: float
    name: str


def bar_chart(bars: Sequence[Bar], axes: tuple[str, str], told: str, marks: Iterable[Mark] = ()) -> Element:
    """Of bars side by side, of one width. `axes` names what goes to the right, and up; `told` is all that in words."""
    end = bars[-1].end
    ticks_up = ticks(max(bar.answered + bar.failed for bar in bars), is_whole=True)
    top = ticks_up[-1]

    def right(value: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * value / end

    def up(value: float) -> float:
        return _BOTTOM - (_BOTTOM - _TOP) * value / top

    def box(kind: str, bar: Bar, low: int, high: int) -> Element:
        # A hair apart where there is room for it.
        x, width = right(bar.start), right(bar.end) - right(bar.start)
        # One among a million is seen, too.
        y = min(up(high), up(low) - 1)
        return element(
            "rect",
            element("title", f"{bar.start:,g} to {bar.end:,g}: {bar.answered:,} answered, {bar.failed:,} failed"),
            class_=kind,
            x=f"{x:.1f}",
            y=f"{y:.1f}",
            width=f"{width - min(1.5, width / 5):.1f}",
            height=f"{up(low) - y:.1f}",
        )

    drawn = []
    for value in ticks_up:
        drawn.append(element("line", class_="grid", x1=_LEFT, x2=_RIGHT, y1=f"{up(value):.1f}", y2=f"{up(value):.1f}"))
        drawn.append(_label(f"{value:,g}", _LEFT - 7, up(value) + 4, "end"))
    for value in ticks(end):
        if value <= end:
            drawn.append(_label(f"{value:,g}", right(value), _BOTTOM + 17))
    for bar in bars:
        if bar.answered:
            drawn.append(box("answered", bar, 0, bar.answered))
        if bar.failed:
            drawn.append(box("failed", bar, bar.answered, bar.answered + bar.failed))
    for row, (at, name) in enumerate(marks):
        x = f"{right(min(at, end)):.1f}"
        drawn.append(element("line", class_="mark", x1=x, x2=x, y1=_TOP - 12 + 17 * row, y2=_BOTTOM))
        is_left = right(min(at, end)) < (_LEFT + _RIGHT) / 2
        label_x = float(x) + (5 if is_left else -5)
        drawn.append(_label(name, label_x, _TOP - 3 + 17 * row, "start" if is_left else "end", "mark-name"))
    drawn.append(_label(axes[0], (_LEFT + _RIGHT) / 2, _HEIGHT - 6, kind="axis"))
    drawn.append(_label(axes[1], 2, 13, "start", "axis"))
    return element("svg", *drawn, role="img", aria_label=told, viewBox=f"0 0 {_WIDTH} {_HEIGHT}")


def share_bar(parts: Sequence[tuple[str, int]], told: str) -> Element:
    """One bar, of which each kind has its share."""
    total, x, drawn = sum(count for _, count in parts) or 1, 0.0, []
    for kind, count in parts:
        width = 1000 * count / total
        if count:
            drawn.append(element("rect", class_=kind, x=f"{x:.1f}", y=0, width=f"{max(width, 3):.1f}", height=10))
        x += width
    return element(
        "svg", *drawn, class_="share", role="img", aria_label=told, viewBox="0 0 1000 10", preserveAspectRatio="none"
    )


def ticks(most: float, is_whole: bool = False) -> list[float]:
    """Round numbers from 0 to `most` or just above it."""
    step = round_up(most / _MAX_TICKS)
    if is_whole:
        step = max(1, math.ceil(step))
    return [index * step for index in range(math.ceil(most / step) + 1)]


def round_up(value: float) -> float:
    """To 1, 2 or 5 of a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(round(step * power, 12) for step in (1, 2, 5, 10) if step * power >= value * (1 - 1e-9))


def _label(text: str, x: float, y: float, anchor: str = "middle", kind: str = "label") -> Element:
    return element("text", text, class_=kind, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor)
