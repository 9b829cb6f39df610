"""Every sentence of README and docs is held by a test that quotes it, or stands in `untested/` with the reason.

A test quotes with `@pytest.mark.holds("docs/page.md#heading", "a sentence, or enough of it to know it by", ...)`: links
without their addresses, nothing bold. A block of code counts as a sentence; the first row of a table stands for all.
`python -m tests.claims.test_every_sentence docs/page.md` prints what of a page is neither held nor listed.
"""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
UNTESTED = Path(__file__).parent / "untested"

# Their sentences are figures with machine and date, or are made from the code, or are for a machine with a GPU.
OTHERWISE_HELD = {"benchmarks.md", "reference.md", "first-gpu-run.md"}
PAGES = ["README.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md")))]
PAGES = [page for page in PAGES if Path(page).name not in OTHERWISE_HELD]

REASONS = {
    "explains": "says what something is, why, where to read on or what to do: nothing that could turn out false here",
    "figure": "was measured; docs/benchmarks.md has machine and date",
    "gpu": "needs a GPU",
    "hours": "takes longer than a test may: `make soak`, an outage, a timeout of minutes",
    "world": "is true of other programs, services or hardware that are not here",
}

every_page = pytest.mark.parametrize("page", PAGES)


class Sentence(NamedTuple):
    """`table` is the first row of the table that it is a row of."""

    heading: str
    text: str
    table: str = ""

    def is_held_by(self, quote: str) -> bool:
        return quote in self.text or (quote in self.table if self.table else False)


class Claim(NamedTuple):
    place: str
    quote: str
    test: str


@cache
def sentences(page: str) -> tuple[Sentence, ...]:
    return tuple(_sentences((ROOT / page).read_text()))


def _sentences(text: str) -> Iterator[Sentence]:
    heading, row, table = "", None, ""
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    for before, token in zip([None, *tokens], tokens, strict=False):
        match token.type:
            case "inline" if before.type == "heading_open":
                # As GitHub makes anchors.
                heading = re.sub(r"[^\w -]", "", token.content.lower()).replace(" ", "-")
            case "inline" if row is not None:
                row.append(_plain(token.content))
            case "inline":
                for sentence in re.split(r"(?<!e\.g\.)(?<=[.?!])\s+(?=[A-Z0-9`*(\"])", _plain(token.content)):
                    yield Sentence(heading, sentence)
            case "fence":
                yield Sentence(heading, _plain(token.content))
            case "table_open":
                table = ""
            case "tr_open":
                row = []
            case "tr_close":
                if words := " | ".join(filter(None, row)):
                    table = table or words
                    yield Sentence(heading, words, table)
                row = None


def _plain(text: str) -> str:
    return " ".join(re.sub(r"\[([^\]]+)\]\([^)\s]+\)", r"\1", text).replace("**", "").split())


@cache
def claims() -> tuple[Claim, ...]:
    return tuple(claim for file in sorted(ROOT.glob("tests/**/test_*.py")) for claim in _claims(file))


def _claims(file: Path) -> Iterator[Claim]:
    if "mark.holds" not in (text := file.read_text()):
        return
    for test in ast.walk(ast.parse(text)):
        for mark in getattr(test, "decorator_list", ()):
            if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.holds":
                place, *quotes = map(ast.literal_eval, mark.args)
                for quote in quotes:
                    yield Claim(place, quote, f"{file.relative_to(ROOT)}::{test.name}")


def untested(page: str) -> dict[str, list[str]]:
    """Sentences by reason, each by its opening words."""
    file = UNTESTED / f"{Path(page).stem}.toml"
    return tomllib.loads(file.read_text()) if file.exists() else {}


def unheld(page: str) -> Iterator[Sentence]:
    quotes = [(claim.place, claim.quote) for claim in claims()]
    openings = tuple(opening for listed in untested(page).values() for opening in listed)
    for sentence in sentences(page):
        held = any(place == f"{page}#{sentence.heading}" and sentence.is_held_by(quote) for place, quote in quotes)
        if not (held or sentence.text.startswith(openings) or (sentence.table and sentence.table.startswith(openings))):
            yield sentence


@every_page
def test_every_sentence_is_held_or_listed(page: str) -> None:
    new = [f"{page}#{sentence.heading}: {sentence.text}" for sentence in unheld(page)]
    assert not new, f"hold each by a test, or list it in {UNTESTED.relative_to(ROOT)} with the reason"


def test_every_quote_stands_where_its_test_says() -> None:
    wrong = []
    for claim in claims():
        page, _, heading = claim.place.partition("#")
        if page not in PAGES or not any(s.heading == heading and s.is_held_by(claim.quote) for s in sentences(page)):
            wrong.append(f"{claim.test}: {claim.place} does not say: {claim.quote}")
    assert not wrong, "a page that loses a sentence loses its test, one that changes it has its test changed"


@every_page
def test_what_is_listed_stands_on_the_page_once_and_is_held_by_no_test(page: str) -> None:
    listed = untested(page)
    assert listed.keys() <= REASONS.keys()
    quotes = [claim.quote for claim in claims() if claim.place.startswith(f"{page}#")]
    for opening in (opening for openings in listed.values() for opening in openings):
        found = [sentence for sentence in sentences(page) if sentence.text.startswith(opening)]
        assert len(found) == 1, f"{page} has {len(found)} sentences that begin with: {opening}"
        assert not any(found[0].is_held_by(quote) for quote in quotes), f"held by a test, and listed: {opening}"


def test_no_page_is_listed_that_is_gone() -> None:
    assert {file.stem for file in UNTESTED.glob("*.toml")} <= {Path(page).stem for page in PAGES}


if __name__ == "__main__":
    for sentence in unheld(sys.argv[1]):
        print(f"#{sentence.heading}\n    {sentence.text}")
