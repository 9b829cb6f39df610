"""Whole batches of each kind of input, gone on with: what is in the two files is what was in the input, once."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from keye.config.faults import InvalidBatch
from keye.config.job import AnalysisJob
from keye.producer.testing import MemoryClient

JPEG = b"\xff\xd8\xff\xe0"
INLINE = "data:image/jpeg;base64,/9j/4A=="


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def media_of(job: AnalysisJob) -> str:
    """What it is about is its answer."""
    return " ".join(medium.uri for medium in job.all_media())


def run(given: str, prompt: str | None = None) -> tuple[dict[str, str], dict[str, str]]:
    """By custom_id, all that was answered and all that was not."""
    MemoryClient(media_of).submit_batch(given, "out.jsonl", prompt).wait(30)
    answers = {line["custom_id"]: line["answer"] for line in lines_of("out.jsonl")}
    errors = {line["custom_id"]: line["message"] for line in lines_of("out.errors.jsonl")}
    assert len(answers) + len(errors) == len([*lines_of("out.jsonl"), *lines_of("out.errors.jsonl")])
    return answers, errors


def lines_of(name: str) -> Iterator[dict[str, Any]]:
    if os.path.exists(name):
        with open(name) as file:
            yield from map(json.loads, file)


def test_a_folder_whose_files_have_odd_names_is_gone_on_with(here: Path) -> None:
    (here / "photos").mkdir()
    for name in (b"caf\xe9.jpg", "é\n'.jpg".encode()):
        (here / "photos" / os.fsdecode(name)).write_bytes(JPEG)
    (here / "photos" / "empty.jpg").touch()
    answers, errors = run("photos", "?")
    assert answers == {"caf\\xe9.jpg": INLINE, "é\n'.jpg": INLINE}
    assert errors == {"empty.jpg": "line 2: 1 fault: media.0: is empty."}
    (here / "photos" / "ü.jpg").write_bytes(JPEG)
    assert run("photos", "?")[0] == answers | {"ü.jpg": INLINE}


@pytest.mark.parametrize(
    ("name", "head", "row"),
    [
        ("in.jsonl", "", '{{"custom_id": "{0}", "media": "{0}", "prompt": "?"}}\n'),
        ("in.csv", "custom_id;image;prompt\n", "{0};{0};?\n"),
        ("in.tsv", "id\tmedia\tprompt\n", "{0}\t{0}\t?\n"),
    ],
)
def test_relative_paths_in_a_file_are_of_the_current_folder_and_lines_may_follow(
    here: Path, name: str, head: str, row: str
) -> None:
    (here / "lists").mkdir()
    (here / "a.jpg").write_bytes(JPEG)
    given = here / "lists" / name
    given.write_text(head + row.format("a.jpg") + row.format("gone.jpg") + row.format("s3://b/1.jpg"))
    answers, errors = run(f"lists/{name}")
    assert answers == {"a.jpg": INLINE, "s3://b/1.jpg": "s3://b/1.jpg"}
    assert f"there is no 'gone.jpg' in {here}" in errors["gone.jpg"]
    with given.open("a") as file:
        file.write(row.format("s3://b/2.jpg"))
    assert run(f"lists/{name}") == (answers | {"s3://b/2.jpg": "s3://b/2.jpg"}, errors)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("gone.jsonl", "gone.jsonl cannot be read: No such file or directory"),
        ("gone/", "gone/ cannot be read: "),
        ("a\0b", "is none: embedded null byte"),
        ("/dev/null", "it is no file, which could be gone back to"),
        ("media.csv", "media.csv has no column prompt, but media. Give one question, for all"),
        (".", "holds no questions"),
        ("s3://photos/", "holds no questions"),
    ],
)
def test_what_is_no_input_is_told_before_anything_is_written(here: Path, given: str, sentence: str) -> None:
    (here / "media.csv").write_text("media\ns3://b/1.jpg\n")
    with pytest.raises(InvalidBatch, match=sentence):
        MemoryClient().submit_batch(given, "out.jsonl")
    assert os.listdir() == ["media.csv"]
