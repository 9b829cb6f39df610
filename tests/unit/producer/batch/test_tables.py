"""Tables as spreadsheets and programs write them: each row is a job, and a fault costs its own row alone."""

import csv
from pathlib import Path
from typing import Any

import pytest

from keye.config.faults import InvalidBatch, InvalidJob
from keye.config.job import AnalysisJob, GenerationOptions, ImagePart, Thinking, VideoPart
from keye.config.wire import MAX_SEALED_BYTES
from keye.producer.batch.lines import Line
from keye.producer.batch.source import Table
from keye.producer.client import build_job


def rows_of(path: Path, content: str | bytes) -> list[Line]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    table = Table(str(path))
    found = list(table.lines())
    table.close()
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "in.csv"


def job_of(line: Line) -> AnalysisJob:
    assert not isinstance(line.asked, InvalidJob), str(line.asked)
    return build_job(line.asked)


@pytest.mark.holds(
    "docs/batches.md#what-can-the-input-be",
    "a table, `.csv` or `.tsv` in UTF-8 |",
    "`INPUT` | a job is |",
)
def test_a_row_is_what_its_columns_say(path: Path) -> None:
    header = "id,media,image,video,media,prompt,thinking,max_new_tokens,temperature,stop,deadline_seconds,priority,"
    header += "result_ttl_seconds,idempotency_key,owner,messages"
    row = 'a,s3://b/1.jpg,s3://b/2,s3://b/3,s3://b/4.mp4,"What, ""this""?\nAnd that?",no_think,256,0.5,.,30,high,'
    (line,) = rows_of(path, f"{header}\n{row}600,key,Ann,none\n")
    assert (line.number, line.custom_id) == (2, "a")
    assert job_of(line) == AnalysisJob(
        media=(
            ImagePart(uri="s3://b/1.jpg"),
            ImagePart(uri="s3://b/2"),
            VideoPart(uri="s3://b/3"),
            VideoPart(uri="s3://b/4.mp4"),
        ),
        prompt='What, "this"?\nAnd that?',
        thinking=Thinking.NO_THINK,
        generation=GenerationOptions(max_new_tokens=256, temperature=0.5, stop=(".",)),
        deadline_seconds=30,
        priority="high",
        result_ttl_seconds=600,
        idempotency_key="key",
        metadata={"owner": "Ann", "messages": "none"},
    )


def test_an_empty_cell_says_nothing(path: Path) -> None:
    rows = rows_of(path, "custom_id,image,image,prompt,seed,owner\n,s3://b/1,,?,,\n,,,,,\n\nx,,,??\n")
    assert [(row.number, row.custom_id, row.asked) for row in rows] == [
        (
            2,
            "line-2",
            {"media": [{"type": "image", "uri": "s3://b/1"}], "prompt": "?", "generation": {}, "metadata": {}},
        ),
        (5, "x", {"media": [], "prompt": "??", "generation": {}, "metadata": {}}),
    ]


@pytest.mark.parametrize("name", ["in.csv", "in.tsv", "IN.CSV"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_whatever_a_spreadsheet_puts_between_cells(tmp_path: Path, name: str, delimiter: str, quoting: int) -> None:
    path = tmp_path / name
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter, quoting=quoting)  # type: ignore[arg-type]
        writer.writerows([["custom_id", "media", "prompt"], ["ä", "s3://b/1;2,3.jpg", "a;b,c\td\r\ne"]])
    table = Table(str(path))
    (line,) = table.lines()
    table.close()
    assert table.columns == ["custom_id", "media", "prompt"]
    assert (line.custom_id, job_of(line).prompt) == ("ä", "a;b,c\td\r\ne")


def test_what_spreadsheets_and_people_leave_between_and_behind_cells_says_nothing(path: Path) -> None:
    rows = rows_of(path, 'id, prompt, owner,,\na, "b, c", "",,\nd,e\nf,g,h,,,,\n')
    assert [(row.custom_id, row.asked) for row in rows] == [
        ("a", {"media": [], "prompt": "b, c", "generation": {}, "metadata": {}}),
        ("d", {"media": [], "prompt": "e", "generation": {}, "metadata": {}}),
        ("f", {"media": [], "prompt": "g", "generation": {}, "metadata": {"owner": "h"}}),
    ]


def test_one_column_is_enough(path: Path) -> None:
    assert [job_of(row).prompt for row in rows_of(path, "prompt\nwhat?\n")] == ["what?"]
    (line,) = rows_of(path, "media\ns3://b/1.jpg")
    assert line.asked == {"media": ["s3://b/1.jpg"], "generation": {}, "metadata": {}}


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (b'x,"unclosed', "is no row of a table"),
        (b'x,"a"b', "is no row of a table"),
        (b"x,\xff", "in UTF-8"),
        (b"x,?,1,2", "is a row of 4 cells, the first has 3"),
        (b"x," + b"y" * 140_000, "field larger than field limit (131072)). A line of JSON holds any text"),
        (b"y" * 1025 + b",?", "custom_id: Input should be text of 1 to 1024 characters"),
    ],
)
def test_a_row_that_is_none_costs_itself(path: Path, row: bytes, fault: str) -> None:
    before, broken, behind = rows_of(path, b'custom_id,prompt,a\na,?,\n%s\nb,"?",""\n' % row)
    assert (before.custom_id, behind.custom_id, behind.number) == ("a", "b", 4)
    assert (broken.number, broken.custom_id) == (3, None)
    assert fault in str(broken.asked)


def test_unclosed_quotes_in_many_rows_cost_those(path: Path) -> None:
    """Each is read to the next quote, and not to the end of the file."""
    num_rows = 20_000
    text = "".join(f'{i},"open\n' if i % 100 == 0 else f"{i},fine\n" for i in range(num_rows))
    rows = rows_of(path, "custom_id,prompt\n" + text)
    assert [row.number for row in rows] == list(range(2, num_rows + 2))
    assert [row.number for row in rows if row.custom_id is None] == list(range(2, num_rows + 2, 100))


def test_a_row_beyond_the_limit_is_passed_over(path: Path) -> None:
    cell = '"' + "x" * 100_000 + '\n",'
    rows = rows_of(path, f"custom_id,prompt\na,{cell * (MAX_SEALED_BYTES // 100_000 + 1)}\nb,?\n")
    assert "more than 16,777,216 bytes, the limit" in str(rows[0].asked)
    assert (rows[0].number, rows[-1].custom_id) == (2, "b")


@pytest.mark.parametrize(
    ("column", "cell"),
    [
        ("max_new_tokens", "many"),
        ("temperature", "0,5"),
        ("thinking", "yes"),
        ("deadline_seconds", "-1"),
        ("seed", "1.5"),
    ],
)
def test_a_cell_that_no_job_takes_is_refused_by_name(path: Path, column: str, cell: str) -> None:
    (line,) = rows_of(path, f'prompt,{column}\n?,"{cell}"\n')
    with pytest.raises(InvalidJob, match=column):
        job_of(line)


@pytest.mark.parametrize(
    ("header", "fault"),
    [
        ("", "does not name every column"),
        ("\nprompt\n", "does not name every column"),
        ("prompt,,media", "does not name every column"),
        (",prompt", "does not name every column"),
        (";;;", "does not name every column"),
        ("prompt,owner,owner", "says owner twice"),
        ("prompt,prompt", "says prompt twice"),
        ("custom_id,Prompt", "calls no column prompt, media, image, video"),
        ("prompt,image_url", "calls a column image_url: media are in those called media, image, video"),
        ("prompt,Path", "calls a column Path"),
        ('"prompt', "is no row of a table"),
        ("pr\xffmpt".encode("latin-1"), "in UTF-8"),
    ],
)
def test_a_first_row_that_names_no_columns_is_told_before_anything_is_sent(path: Path, header: Any, fault: str) -> None:
    with pytest.raises(InvalidBatch) as told:
        rows_of(path, header)
    assert "line 1: " in str(told.value)
    assert fault in str(told.value)
