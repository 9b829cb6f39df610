"""README.zh-CN.md says what README.md says: headings, blocks of code, links and what stands between backticks."""

import re
from collections import Counter
from collections.abc import Callable

import pytest

from tests.support.checkout import ROOT

ORIGINAL, TRANSLATION = ((ROOT / name).read_text() for name in ("README.md", "README.zh-CN.md"))
TO_EACH_OTHER = {"README.md", "README.zh-CN.md"}


def sections(text: str) -> list[tuple[str, str]]:
    """The level of each heading, and what stands below it."""
    blocks = re.compile(r"^(```.*?^```)|^(#+) [^\n]*$", re.DOTALL | re.MULTILINE)
    headings = [found for found in blocks.finditer(text) if found[2]]
    ends = [*(found.start() for found in headings[1:]), len(text)]
    return [(found[2], text[found.end() : end]) for found, end in zip(headings, ends, strict=True)]


def code(text: str) -> list[str]:
    """Blocks of code, whose remarks are translated."""
    return [re.sub(r" +# .*$", " #", block, flags=re.MULTILINE) for block in re.findall(r"```.*?```", text, re.DOTALL)]


def prose(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def links(text: str) -> list[str]:
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", prose(text)) if link not in TO_EACH_OTHER]


def spans(text: str) -> Counter[str]:
    return Counter(re.findall(r"`[^`]+`", prose(text)))


def num_rows(text: str) -> int:
    return len(re.findall(r"^\|", prose(text), re.MULTILINE))


@pytest.mark.parametrize("part", [code, links, spans, num_rows])
def test_each_section_has_what_the_original_has(part: Callable[[str], object]) -> None:
    for (_, original), (_, translated) in zip(sections(ORIGINAL), sections(TRANSLATION), strict=True):
        assert part(translated) == part(original)


def test_headings_are_in_the_same_order() -> None:
    levels = [level for level, _ in sections(ORIGINAL)]
    assert len(levels) > 5
    assert [level for level, _ in sections(TRANSLATION)] == levels


def test_each_leads_to_the_other() -> None:
    assert "](README.zh-CN.md)" in ORIGINAL.partition("\n## ")[0]
    assert "](README.md)" in TRANSLATION.partition("\n## ")[0]


def test_it_is_as_short() -> None:
    assert len(TRANSLATION.splitlines()) < 130
