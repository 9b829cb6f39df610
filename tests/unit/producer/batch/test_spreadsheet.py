"""Tables as spreadsheets write them."""

from contextlib import closing
from pathlib import Path

import pytest

from keye.producer.batch.source import Table


@pytest.mark.parametrize("delimiter", [",", ";"])
def test_columns_are_told_apart_by_what_the_first_row_has(delimiter: str, tmp_path: Path) -> None:
    rows = ["id", "image", "prompt", "price"], ["7", "a.png", '"What; is, it?"', '"0,5"']
    table = tmp_path / "table.csv"
    table.write_bytes(b"\xef\xbb\xbf" + "".join(delimiter.join(row) + "\r\n" for row in rows).encode())
    with closing(Table(str(table))) as source:
        (line,) = source.lines()
    assert (line.number, line.custom_id) == (2, "7")
    assert line.asked == {
        "media": [{"type": "image", "uri": "a.png"}],
        "generation": {},
        "metadata": {"price": "0,5"},
        "prompt": "What; is, it?",
    }
