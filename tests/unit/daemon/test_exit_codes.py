"""Exit codes are told to operators as they are."""

from pathlib import Path

import pytest

from keye.worker.daemon.exit_codes import ExitCode, describe

OPERATIONS = Path(__file__).resolve().parents[3] / "docs" / "operations.md"


@pytest.mark.holds("docs/operations.md#how-did-a-process-end", "code | name | meaning")
def test_the_table_of_the_operators_page_equals_the_enum() -> None:
    rows = [line for line in OPERATIONS.read_text().splitlines() if line.startswith("| `")]
    cells = [[cell.strip().strip("`") for cell in row.strip("|").split("|")] for row in rows]
    assert cells == [[str(code.value), code.name, code.meaning] for code in ExitCode]


def test_return_codes_are_put_in_words() -> None:
    assert describe(-9) == "killed by signal 9"
    assert describe(12) == "exit code 12 (MODEL_LOAD_FAILED)"
    assert describe(3) == "exit code 3"
