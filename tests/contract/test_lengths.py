"""No file of tests is so long that one thing in it cannot be found: it is split by what it is about."""

from tests.support.checkout import ROOT

MAX_LINES = 400


def test_no_test_file_is_over_400_lines() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in ROOT.glob("tests/**/*.py")}
    assert len(lengths) > 100
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}
