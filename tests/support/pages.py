"""The code that a page prints, as it is printed."""

import re

from tests.support.checkout import ROOT


def printed(page: str, heading: str | None = None, language: str = "python") -> list[str]:
    """The blocks of a section, which ends where another of its rank begins, or of the whole page."""
    text = (ROOT / page).read_text()
    if heading:
        text = text.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [block for named, block in blocks if named == language]
