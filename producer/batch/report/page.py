"""The page about a batch, from what was gathered for it: HTML that needs nothing beside itself, and runs no script."""

import base64
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import NamedTuple
from xml.etree.ElementTree import Element

from keye.producer.batch.report.chart import Bar, Mark, bar_chart, share_bar
from keye.producer.batch.report.markup import Excerpt, document, element
from keye.producer.batch.report.thumbnails import Thumbnail

# Beyond it an answer is folded.
_START_CHARS = 360
_SPANS = ((86400, "days"), (3600, "hours"), (60, "minutes"), (1, "seconds"))


class Asked(NamedTuple):
    """What stands at the head of it: `input` is what was read, `facts` are further words about it."""

    input: str
    prompt: Excerpt | None
    facts: Sequence[str]


class Totals(NamedTuple):
    """Times are Unix seconds, `ended_at` that of the last end so far, or None."""

    answered: int
    failed: int
    unended: int
    is_read: bool
    begun_at: float
    ended_at: float | None

    @property
    def lines(self) -> int:
        return self.answered + self.failed + self.unended


class Seconds(NamedTuple):
    """How long answers took: `bars` of them, and what half of them, 95 of 100 and all stayed within.

    Of the last bar `num_beyond` took longer than it says.
    """

    bars: Sequence[Bar]
    half: float
    most: float
    all: float
    num_beyond: int


class Failures(NamedTuple):
    """Of one code; `examples` are messages, each with the `custom_id`s of lines it was said of."""

    code: str
    meaning: str
    num_lines: int
    examples: Mapping[str, Sequence[str]]


class Answer(NamedTuple):
    custom_id: str
    number: int
    question: Excerpt | None
    answer: Excerpt
    reasoning: Excerpt | None
    model: str
    facts: Sequence[str]
    thumbnails: Sequence[Thumbnail]
    num_media: int


class Page(NamedTuple):
    """All that it says. `width` is how many seconds each of the bars `ends` is of; `files` have answers, and errors."""

    asked: Asked
    totals: Totals
    width: float
    ends: Sequence[Bar]
    seconds: Seconds | None
    failures: Sequence[Failures]
    answers: Sequence[Answer]
    lacks: Iterable[str]
    files: tuple[str, str]
    written_at: float


def write_page(page: Page) -> str:
    style = _style()
    # The one style is known by its hash: no other, and nothing else but pictures of this page, is followed.
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="referrer", content="no-referrer"),
        element("title", f"{page.asked.input}: batch report"),
        element("link", rel="icon", href="data:,"),
        element("style", style),
    )
    sections = (_totals(page.totals), _times(page), _failures(page), _answers(page))
    body = element("body", _header(page), element("main", *sections), _footer(page))
    return document(element("html", head, body, lang="en"))


@cache
def _style() -> str:
    return Path(__file__).with_name("page.css").read_text()


def _header(page: Page) -> Element:
    asked, totals = page.asked, page.totals
    facts = [*asked.facts, f"begun {_when(totals.begun_at)}"]
    if totals.ended_at is not None:
        took = _span(max(totals.ended_at - totals.begun_at, 0))
        facts.append(f"{took} so far" if totals.unended or not totals.is_read else f"took {took}")
    return element(
        "header",
        element("p", "Batch report", class_="kicker"),
        element("h1", asked.input),
        None if asked.prompt is None else _prose(asked.prompt, "asked"),
        element("p", " · ".join(facts), class_="facts"),
    )


def _totals(totals: Totals) -> Element:
    seconds = max(totals.ended_at - totals.begun_at, 0) if totals.ended_at is not None else 0
    tiles = [
        ("lines", f"{totals.lines:,}", "" if totals.is_read else "read so far, and more to come"),
        ("answered", f"{totals.answered:,}", _share(totals.answered, totals.lines)),
        ("failed", f"{totals.failed:,}", _share(totals.failed, totals.lines)),
    ]
    if totals.unended:
        tiles.append(("not ended", f"{totals.unended:,}", "the same command goes on with them"))
    if totals.answered and seconds >= 1:
        tiles.append(("answers per minute", _number(totals.answered / seconds * 60), "over the whole time"))
    told = f"{totals.answered:,} answered, {totals.failed:,} failed, {totals.unended:,} not ended"
    parts = ("answered", totals.answered), ("failed", totals.failed), ("unended", totals.unended)
    return element(
        "section",
        element("h2", "Totals", class_="unseen"),
        element("dl", *(_tile(*each) for each in tiles), class_="tiles"),
        share_bar(parts, told),
    )


def _tile(name: str, value: str, note: str) -> Element:
    kind = f"tile {name}" if value != "0" else "tile"
    number = element("dd", value, class_="number")
    told = element("dd", note, class_="note") if note else None
    return element("div", element("dt", name), number, told, class_=kind)


def _times(page: Page) -> Element | None:
    figures = []
    if page.ends:
        per, unit = page.width, next(each for each in _SPANS if page.ends[-1].end >= 2 * each[0] or each[0] == 1)
        bars = [bar._replace(start=bar.start / unit[0], end=bar.end / unit[0]) for bar in page.ends]
        most = max(bar.answered + bar.failed for bar in bars)
        told = f"At most {most:,} lines ended within {_span(per)}."
        if gap := _longest_gap(page.ends):
            told += f" From {_span(gap[0])} to {_span(gap[1])} after the beginning none did."
        axes = f"{unit[1]} since it was begun", f"lines per {_span(per)}"
        figures.append(_figure("When they ended", told, bars, axes, ()))
    if seconds := page.seconds:
        told = (
            f"Half of the answers came within {_number(seconds.half)} s of being sent, 95 of 100 within "
            f"{_number(seconds.most)} s, all within {_number(seconds.all)} s; the wait in the queue is part of that."
        )
        if seconds.num_beyond:
            told += f" The last bar has {seconds.num_beyond:,} that took longer than it says."
        marks = (
            Mark(seconds.half, f"median {_number(seconds.half)} s"),
            Mark(seconds.most, f"p95 {_number(seconds.most)} s"),
        )
        figures.append(
            _figure("How long answers took", told, seconds.bars, ("seconds from sent to answered", "answers"), marks)
        )
    return element("section", *figures, class_="charts") if figures else None


def _figure(title: str, told: str, bars: Sequence[Bar], axes: tuple[str, str], marks: Sequence[Mark]) -> Element:
    kinds = ["answered", "failed"] if any(bar.failed for bar in bars) else ["answered"]
    rows = []
    for bar in bars:
        if bar.answered or bar.failed:
            cells = [element("td", f"{getattr(bar, kind):,}") for kind in kinds]
            rows.append(element("tr", element("th", f"{bar.start:,g} to {bar.end:,g}", scope="row"), *cells))
    keys = [element("span", kind, class_=f"key {kind}") for kind in kinds]
    heads = element("tr", *(element("th", name, scope="col") for name in (axes[0], *kinds)))
    table = element("table", element("thead", heads), element("tbody", *rows))
    return element(
        "figure",
        element("h2", title),
        element("figcaption", told),
        bar_chart(bars, axes, f"{title}. {told}", marks),
        element("p", *keys, class_="legend") if len(keys) > 1 else None,
        element("details", element("summary", "As a table"), table, class_="fold"),
    )


def _failures(page: Page) -> Element | None:
    if not page.failures:
        return None
    total = sum(each.num_lines for each in page.failures)
    num_shown = sum(len(ids) for each in page.failures for ids in each.examples.values())
    return element(
        "section",
        element("h2", "Failures"),
        element("p", _where(num_shown, total, "failure", page.files[1]), class_="note"),
        *map(_of_a_code, page.failures),
    )


def _of_a_code(failures: Failures) -> Element:
    messages = []
    for message, custom_ids in failures.examples.items():
        messages.append(element("p", message, class_="prose", dir="auto"))
        messages.append(element("ul", *(element("li", each) for each in custom_ids), class_="ids"))
    count = element("span", f"{failures.num_lines:,} {'line' if failures.num_lines == 1 else 'lines'}", class_="count")
    return element(
        "details",
        element("summary", element("code", failures.code), count),
        element("p", failures.meaning, class_="note") if failures.meaning else None,
        *messages,
        class_="failures",
        open="open",
    )


def _answers(page: Page) -> Element | None:
    if not page.answers:
        return None
    where = _where(len(page.answers), page.totals.answered, "answer", page.files[0])
    lacks = "; ".join(sorted(page.lacks))
    return element(
        "section",
        element("h2", "Answers"),
        element("p", where, class_="note"),
        element("p", f"There would be more thumbnails with {lacks}", class_="note") if lacks else None,
        element("div", *map(_card, page.answers), class_="cards"),
    )


def _where(num_shown: int, total: int, what: str, file: str) -> str:
    if num_shown >= total:
        return f"All of them; they are in {file} too."
    return f"{num_shown:,} of {total:,} {what}s, from all over the batch. All are in {file}."


def _card(answer: Answer) -> Element:
    media = [_thumbnail(each, answer.num_media, index) for index, each in enumerate(answer.thumbnails, 1)]
    if more := answer.num_media - len(answer.thumbnails):
        media.append(element("p", f"and {more:,} more", class_="note"))
    text = element(
        "div",
        element("header", element("h3", answer.custom_id), element("span", f"line {answer.number:,}", class_="note")),
        None if answer.question is None else _prose(answer.question, "question"),
        _prose(answer.answer, "answer"),
        None
        if answer.reasoning is None
        else element("details", element("summary", "Reasoning"), _prose(answer.reasoning, "reasoning"), class_="fold"),
        element("p", " · ".join(answer.facts), class_="note"),
        class_="text",
    )
    return element("article", element("div", *media, class_="media") if media else None, text)


def _thumbnail(thumbnail: Thumbnail, num_media: int, index: int) -> Element:
    of = f", medium {index} of {num_media}" if num_media > 1 else ""
    if not thumbnail.jpeg:
        told = f"{thumbnail.name}{of}: no thumbnail, {thumbnail.why}"
        return element("div", thumbnail.why, class_="none", role="img", aria_label=told, title=thumbnail.name)
    uri = f"data:image/jpeg;base64,{base64.b64encode(thumbnail.jpeg).decode()}"
    return element("img", src=uri, alt=f"thumbnail of {thumbnail.name}{of}", title=thumbnail.name)


def _prose(excerpt: Excerpt, kind: str) -> Element:
    """In whatever language it is; what is long is folded."""
    text, num_chars, is_whole = excerpt
    rest = "" if is_whole else f" … and on to {num_chars:,} characters."
    whole = element("div", text, rest, class_=f"prose {kind}", lang="", dir="auto")
    if len(text) <= _START_CHARS:
        return whole
    start = text[:_START_CHARS]
    begun = element("span", f"{start.rpartition(' ')[0] or start} …", class_="start", lang="", dir="auto")
    more = element("span", f"{num_chars:,} characters", class_="more")
    return element("details", element("summary", begun, more), whole, class_=f"long {kind}")


def _footer(page: Page) -> Element:
    told = f"Written {_when(page.written_at)} by keye. It is all in this file, which asks no network."
    return element("footer", element("p", told))


def _longest_gap(ends: Sequence[Bar]) -> tuple[float, float] | None:
    """From when to when nothing ended after something had, where that is a quarter of the time or more."""
    longest, since = (0.0, 0.0), math.inf
    for bar in ends:
        if bar.answered or bar.failed:
            longest = max(longest, (since, bar.start), key=lambda gap: gap[1] - gap[0])
            since = bar.end
    return longest if longest[1] - longest[0] >= ends[-1].end / 4 else None


def _share(count: int, total: int) -> str:
    if not count or count == total:
        return "none" if not count else "all"
    # Neither none nor all is said of what is not.
    return f"{min(max(100 * count / total, 0.1), 99.9):.1f} %"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 1 else f"{value:.2g}"


def _span(seconds: float) -> str:
    """In the two largest units."""
    if seconds < 1:
        return f"{seconds:.2g} s"
    left, words = round(seconds), []
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        if left >= length:
            words.append(f"{left // length:,} {unit}")
            left %= length
    return " ".join(words[:2])


def _when(at: float) -> str:
    day = datetime.fromtimestamp(at, UTC)
    return f"{day.day} {day:%B %Y, %H:%M} UTC"
