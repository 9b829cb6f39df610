"""The code that a page of docs/ prints, as it is printed."""

import re

from tests.support.checkout import ROOT


def printed(page: str, heading: str, language: str = "python") -> list[str]:
    """The blocks of a section, which ends where another of its rank begins."""
    section = (ROOT / page).read_text().split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)
