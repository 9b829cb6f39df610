"""The README tells the truth about error codes and settings."""

import re
from pathlib import Path

from keye.config.outcome import ErrorCode
from keye.config.settings import Settings

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()


def rows(heading: str) -> list[list[str]]:
    section = README.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]


def test_error_code_table_equals_the_enum() -> None:
    expected = [
        [code.value, code.facts.blame, "yes" if code.facts.retryable else "no", code.facts.meaning]
        for code in ErrorCode
    ]
    assert rows("Error codes") == expected


def test_settings_table_names_every_setting_and_no_other() -> None:
    assert [row[0] for row in rows("Settings")] == [f"KEYE_{name.upper()}" for name in Settings.model_fields]


def test_readme_names_no_setting_that_does_not_exist() -> None:
    known = {f"KEYE_{name.upper()}" for name in Settings.model_fields}
    assert set(re.findall(r"KEYE_[A-Z0-9_]+[A-Z0-9]", README)) <= known
