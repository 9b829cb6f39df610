"""What is written for people is true: the reference equals the code, links lead somewhere, what is named exists."""

import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

from keye.config.codes import ErrorCode
from keye.config.settings import Settings
from keye.producer.shell import ExitCode
from keye.worker.daemon.exit_codes import ExitCode as WorkerExitCode

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = (ROOT / "docs" / "reference.md").read_text()
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def rows(heading: str) -> list[list[str]]:
    section = REFERENCE.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
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


def test_the_reference_is_the_one_made_from_the_code() -> None:
    made = runpy.run_path(str(ROOT / "tools" / "reference.py"))["reference"]()
    assert made == REFERENCE, "run `python tools/reference.py`"


# Where a page tells a default in words.
IN_WORDS = {
    "a day (`KEYE_RESULT_TTL_SECONDS`)": ("docs/keep-my-own-table.md", "result_ttl_seconds", 86400),
    "a day (the default)": ("docs/scaling.md", "result_ttl_seconds", 86400),
    "of jobs that failed for a week": ("docs/keep-my-own-table.md", "dead_letter_ttl_seconds", 7 * 86400),
    "Jobs that failed stay for a week": ("docs/producers.md", "dead_letter_ttl_seconds", 7 * 86400),
}


@pytest.mark.holds("docs/producers.md#from-the-shell", "Jobs that failed stay for a week")
@pytest.mark.holds(
    "docs/keep-my-own-table.md#how-do-i-keep-the-state-of-jobs-in-a-table-of-my-own", "Outcomes stay in Redis for a day"
)
def test_a_default_that_is_told_elsewhere_is_the_one_in_the_code() -> None:
    files = [*PAGES, *ROOT.glob("deploy/**/*.*"), *ROOT.glob("config/*.example"), ROOT / "docker-compose.yml"]
    files += [file for room in ("config", "producer", "worker") for file in ROOT.glob(f"{room}/**/*.py")]
    told = [
        (file.name, name, value)
        for file in files
        for name, behind, beside in re.findall(
            r"KEYE_([A-Z0-9_]+)`?(?: \(`?([\d.]+|/[^`)]+)`?\)|, ([\d.]+)\))", file.read_text()
        )
        for value in (behind or beside,)
    ]
    assert {("reliability.md", "LEASE_SECONDS", "30"), ("keye-worker.service", "DRAIN_SECONDS", "60")} <= set(told)
    defaults = {name.upper(): str(field.default) for name, field in Settings.model_fields.items()}
    assert [each for each in told if each[2] != defaults[each[1]]] == []
    for words, (page, name, value) in IN_WORDS.items():
        assert words in (ROOT / page).read_text()
        assert Settings.model_fields[name].default == value


def test_an_exit_code_that_is_told_is_one() -> None:
    known = {code.value for code in WorkerExitCode} | {code.value for code in ExitCode} | {1}
    for page in PAGES:
        told = re.findall(
            r"\b(?:ends?|ended) (?:by itself, |it the same way )?(?:with|\()\s?(\d+)\b|exit code (\d+)", prose(page)
        )
        assert {int(one or other) for one, other in told} <= known, page.name


@every_page
def test_no_page_names_a_setting_that_does_not_exist(page: Path) -> None:
    known = {f"KEYE_{name.upper()}" for name in Settings.model_fields}
    assert set(re.findall(r"KEYE_[A-Z0-9_]+[A-Z0-9]", page.read_text())) <= known


def test_the_readme_is_two_screens() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@every_page
def test_every_link_leads_to_a_file_and_its_heading(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not link.startswith("https://"):
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            assert target.exists(), f"{link}: there is no {name}"
            assert not anchor or anchor in anchors(target), f"{link}: {target.name} has no such heading"


@every_page
def test_every_file_that_is_named_exists(page: Path) -> None:
    if page.name == "CHANGELOG.md":
        return  # It tells of what was, too.
    folders = r"\.ci|benchmarks|config|docs|examples|producer|src|tests|tools|worker"
    named = re.findall(rf"`((?:{folders})/[\w./-]*)`", prose(page))
    assert [path for path in named if not (ROOT / path).exists()] == []


def prose(page: Path) -> str:
    """The page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> Iterator[str]:
    """Those that GitHub gives a page's headings: lower case, spaces as hyphens, no other marks."""
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        yield re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
