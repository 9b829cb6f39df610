"""Files of a batch that somebody has changed between two runs: it goes on where it can, and else says why not.

No answer is lost or doubled by it, whatever was done to them.
"""

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from keye.config.faults import InvalidBatch
from keye.producer import Client
from tests.integration.batch.conftest import Answering
from tests.support.conditions import eventually


def ask(folder: Path, *custom_ids: str) -> None:
    text = "".join(json.dumps({"custom_id": each, "prompt": each}) + "\n" for each in custom_ids)
    with (folder / "in.jsonl").open("a") as file:
        file.write(text)


def answers(folder: Path) -> list[tuple[str, int]]:
    lines = map(json.loads, (folder / "out.jsonl").read_text().splitlines())
    return sorted((line["custom_id"], line["line"]) for line in lines)


@pytest.fixture
def folder(client: Client, answering: Answering, tmp_path: Path) -> Path:
    """Of a batch of three lines, one of which failed."""
    ask(tmp_path, "a", "fail", "b")
    client.submit_batch(tmp_path / "in.jsonl", tmp_path / "out.jsonl").wait(30)
    return tmp_path


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def change(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"a", b"A", 1))


def put_in_front(path: Path) -> None:
    path.write_text("a note\n" + path.read_text())


def double(path: Path) -> None:
    path.write_bytes(path.read_bytes() * 2)


def append_anothers(path: Path) -> None:
    with path.open("a") as file:
        file.write('{"custom_id": "z", "line": 7, "answer": "by hand"}\n')


@pytest.mark.holds(
    "docs/batches.md#what-if-something-dies",
    "Where one of them, the question, or lines that were read have changed",
)
@pytest.mark.parametrize("name", ["out.jsonl", "out.errors.jsonl"])
@pytest.mark.parametrize("harm", [Path.unlink, truncate, change, put_in_front, double, append_anothers])
def test_an_output_that_is_not_what_was_written_is_left_alone(
    client: Client, folder: Path, name: str, harm: Callable[[Path], object]
) -> None:
    harm(folder / name)
    before = {path: path.read_bytes() for path in folder.glob("out*jsonl")}
    ask(folder, "c")
    with pytest.raises(InvalidBatch, match=rf"/{name} is not what it was: .*another output\."):
        client.submit_batch(folder / "in.jsonl", folder / "out.jsonl")
    assert {path: path.read_bytes() for path in folder.glob("out*jsonl")} == before


@pytest.mark.parametrize("harm", [Path.unlink, truncate, append_anothers])
def test_an_output_that_changes_while_it_is_written_ends_the_batch(
    client: Client, answering: Answering, folder: Path, harm: Callable[[Path], object]
) -> None:
    answering.pause()
    ask(folder, *map(str, range(500)))
    batch = client.submit_batch(folder / "in.jsonl", folder / "out.jsonl", max_in_flight=1)
    eventually(lambda: batch.progress.in_flight)
    answering.go_on()
    eventually(lambda: batch.progress.answered > 2)
    harm(folder / "out.jsonl")
    with pytest.raises(
        InvalidBatch, match=r"/out\.jsonl was removed or changed while it was written: answers are gone"
    ):
        batch.wait(30)


@pytest.mark.holds(
    "docs/design.md#decisions",
    "What stands behind the last that counted",
)
def test_a_line_that_was_cut_short_is_written_again(client: Client, folder: Path) -> None:
    with (folder / "out.jsonl").open("a") as file:
        file.write('{"custom_id": "c", "lin')
    ask(folder, "c")
    client.submit_batch(folder / "in.jsonl", folder / "out.jsonl").wait(30)
    assert answers(folder) == [("a", 1), ("b", 3), ("c", 4)]


def _of_another_release(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("update batch set format = 99")
    db.close()


JOURNALS: dict[str, tuple[Callable[[Path], object], str]] = {
    "removed": (Path.unlink, r"out\.jsonl is there already, and no batch began it"),
    "emptied": (lambda path: path.write_bytes(b""), r"out\.jsonl is there already, and no batch began it"),
    "garbage": (lambda path: path.write_bytes(b"garbage " * 999), r"journal cannot be used: file is not a database"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:5000]), r"journal cannot be used: .*malformed"),
    "another": (_of_another_release, r"journal cannot be used: another release wrote it"),
}


@pytest.mark.parametrize(("harm", "told"), JOURNALS.values(), ids=JOURNALS)
def test_without_its_journal_a_batch_begins_nothing(
    client: Client, folder: Path, harm: Callable[[Path], object], told: str
) -> None:
    before = (folder / "out.jsonl").read_bytes()
    harm(folder / "out.jsonl.journal")
    with pytest.raises(InvalidBatch, match=told):
        client.submit_batch(folder / "in.jsonl", folder / "out.jsonl")
    assert (folder / "out.jsonl").read_bytes() == before


@pytest.mark.holds(
    "docs/batches.md#what-if-something-dies",
    "Lines that are added to the input's end are welcome",
)
def test_lines_that_were_added_to_a_finished_batch_are_answered(
    client: Client, answering: Answering, folder: Path
) -> None:
    ask(folder, "c", "d")
    progress = client.submit_batch(folder / "in.jsonl", folder / "out.jsonl").wait(30)
    assert (progress.lines, progress.answered, progress.failed) == (5, 4, 1)
    assert answers(folder) == [("a", 1), ("b", 3), ("c", 4), ("d", 5)]
    assert set(answering.times.values()) == {1}


def test_lines_behind_a_last_one_without_an_end_have_their_own_numbers(
    client: Client, answering: Answering, tmp_path: Path
) -> None:
    (tmp_path / "in.jsonl").write_text('{"custom_id": "a", "prompt": "a"}')
    client.submit_batch(tmp_path / "in.jsonl", tmp_path / "out.jsonl").wait(30)
    with (tmp_path / "in.jsonl").open("a") as file:
        file.write("\r\n")
    ask(tmp_path, "b")
    client.submit_batch(tmp_path / "in.jsonl", tmp_path / "out.jsonl").wait(30)
    assert answers(tmp_path) == [("a", 1), ("b", 2)]


@pytest.mark.parametrize("beginning", ['{"custom_id": "b", "pro', '{"custom_id": "b", "prompt": "b"}'])
def test_a_last_line_that_somebody_was_still_writing_has_changed(
    client: Client, answering: Answering, tmp_path: Path, beginning: str
) -> None:
    ask(tmp_path, "a")
    with (tmp_path / "in.jsonl").open("a") as file:
        file.write(beginning)
        file.flush()
        client.submit_batch(tmp_path / "in.jsonl", tmp_path / "out.jsonl").wait(30)
        file.write('mpt": "b"}\n')
    with pytest.raises(InvalidBatch, match=r"in\.jsonl is not what it was: its first 2 lines were read before"):
        client.submit_batch(tmp_path / "in.jsonl", tmp_path / "out.jsonl", retry_failed=True)


@pytest.mark.parametrize("harm", [truncate, change, put_in_front])
def test_an_input_whose_lines_have_changed_is_not_gone_on_with(
    client: Client, folder: Path, harm: Callable[[Path], object]
) -> None:
    harm(folder / "in.jsonl")
    with pytest.raises(InvalidBatch, match=r"in\.jsonl is not what it was: its first 3 lines were read before"):
        client.submit_batch(folder / "in.jsonl", folder / "out.jsonl")


def test_a_batch_that_is_gone_with_its_files_begins_anew(client: Client, answering: Answering, folder: Path) -> None:
    for path in folder.glob("out*"):
        path.unlink()
    client.submit_batch(folder / "in.jsonl", folder / "out.jsonl").wait(30)
    assert answers(folder) == [("a", 1), ("b", 3)]
