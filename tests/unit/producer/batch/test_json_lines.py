"""Lines of JSON, whatever stands in them: each comes once, and a fault costs its own line alone."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from keye.config.faults import InvalidBatch, InvalidJob
from keye.config.wire import MAX_SEALED_BYTES
from keye.producer.batch.lines import Line
from keye.producer.batch.source import JsonLines, Position, Table, open_file
from keye.producer.client import build_job

GOOD = b'{"custom_id": "good", "prompt": "?"}'


def lines_of(path: Path, content: bytes) -> list[Line]:
    path.write_bytes(content)
    source = JsonLines(str(path))
    found = list(source.lines())
    again = [source.read(line.number, line.start) for line in found]
    source.close()
    assert list(map(told, again)) == list(map(told, found))
    return found


def told(line: Line) -> tuple[Any, ...]:
    """It, in a form that compares."""
    return (*line[:3], str(line.asked), line.is_openai)


def test_lines_are_numbered_as_editors_number_them(tmp_path: Path) -> None:
    content = (
        b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n \t\n{"prompt": "b", "custom_id": "x"}\n{"prompt": "c", "custom_id": null}'
    )
    found = lines_of(tmp_path / "in.jsonl", content)
    assert [(line.number, line.custom_id, line.asked) for line in found] == [
        (1, "line-1", {"prompt": "a"}),
        (4, "x", {"prompt": "b"}),
        (5, "line-5", {"prompt": "c"}),
    ]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (b"{", "job: is no JSON (Expecting property name"),
        (b'{"prompt": "\xff"}', "job: is no JSON ('utf-8' codec can't decode byte 0xff"),
        (b'{"prompt": "a\0b"}', "job: is no JSON (Invalid control character at, character 14)"),
        (b"[" * 100_000, "job: is no JSON ("),
        (b'{"n": ' + b"9" * 5000 + b"}", "job: is no JSON (Exceeds the limit"),
        (b"[1]", "job: is no JSON object"),
        (b'"text"', "job: is no JSON object"),
        (b"\0", "job: is no JSON ("),
        (b'{"prompt": "?", "custom_id": 7}', "custom_id: Input should be text of 1 to 1024 characters"),
        (b'{"prompt": "?", "custom_id": ""}', "custom_id: "),
        (b'{"prompt": "?", "custom_id": ["a"]}', "custom_id: "),
        (b'{"prompt": "?", "custom_id": "\\ud800"}', "custom_id: "),
        (b'{"prompt": "?", "custom_id": "%s"}' % (b"x" * 1025), "custom_id: "),
    ],
)
def test_a_line_that_is_no_job_costs_itself(tmp_path: Path, text: bytes, fault: str) -> None:
    before, broken, behind = lines_of(tmp_path / "in.jsonl", b"\n".join((GOOD, text, GOOD)))
    assert before.custom_id == behind.custom_id == "good"
    assert (broken.number, broken.custom_id) == (2, None)
    assert isinstance(broken.asked, InvalidJob)
    assert fault in str(broken.asked)


def test_a_line_without_an_end_is_the_last_even_where_somebody_is_still_writing_it(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(GOOD + b"\n" + GOOD[:9])
    source = JsonLines(str(path))
    lines = source.lines()
    found = [next(lines), next(lines)]
    with path.open("ab") as file:
        file.write(GOOD[9:] + b"\n" + GOOD)
    assert list(lines) == []
    assert [line.number for line in found] == [1, 2]
    assert source.position.end == len(GOOD) + 10
    source.close()


@pytest.mark.parametrize("text", ['{"prompt": "?", "generation": {"temperature": NaN}}', '{"prompt": "\\ud800"}'])
def test_what_json_takes_and_no_job_does_is_refused_under_its_name(tmp_path: Path, text: str) -> None:
    (line,) = lines_of(tmp_path / "in.jsonl", text.encode())
    assert line.custom_id == "line-1"
    with pytest.raises(InvalidJob):
        build_job(line.asked)  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [1, 1024])
def test_a_name_may_be_as_long_as_a_key_of_s3(tmp_path: Path, length: int) -> None:
    (line,) = lines_of(tmp_path / "in.jsonl", json.dumps({"custom_id": "é" * length, "prompt": "?"}).encode())
    assert line.custom_id == "é" * length


@pytest.mark.holds(
    "docs/batches.md#what-can-the-input-be",
    "JSON lines | a line: the fields",
)
def test_an_id_will_do_for_a_custom_id(tmp_path: Path) -> None:
    alone, beside = lines_of(tmp_path / "in.jsonl", b'{"id": "a", "prompt": "?"}\n{"id": 7, "custom_id": "b"}')
    assert (alone.custom_id, alone.asked) == ("a", {"prompt": "?"})
    assert (beside.custom_id, beside.asked) == ("b", {"id": 7})


def test_of_a_name_that_is_said_twice_the_last_counts(tmp_path: Path) -> None:
    (line,) = lines_of(tmp_path / "in.jsonl", b'{"custom_id": "a", "prompt": "1", "custom_id": "b", "prompt": "2"}')
    assert (line.custom_id, line.asked) == ("b", {"prompt": "2"})


@pytest.mark.parametrize(
    ("head", "custom_id", "is_openai"),
    [
        (b'{"prompt": "', None, False),
        (b' {"custom_id" : "a\\"b", "prompt": "', 'a"b', False),
        (b'{"custom_id": "a", "body": {"messages": "', "a", True),
        (b'{"custom_id": "\xff", "body": "', None, True),
        (b'{"custom_id": "", "body": "', None, True),
    ],
)
def test_a_line_beyond_the_limit_is_passed_over_in_bounded_memory(
    tmp_path: Path, head: bytes, custom_id: str | None, is_openai: bool
) -> None:
    path = tmp_path / "in.jsonl"
    with path.open("wb") as file:
        file.write(head)
        file.truncate(6 * MAX_SEALED_BYTES)
        file.seek(0, 2)
        file.write(b'"}\n' + GOOD)
    tracemalloc.start()
    source = JsonLines(str(path))
    long, good = source.lines()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    source.close()
    assert (long.number, long.custom_id, long.is_openai) == (1, custom_id, is_openai)
    assert (good.number, good.custom_id) == (2, "good")
    assert "more than 16,777,216 bytes, the limit. Put its media where workers find them" in str(long.asked)
    assert most < 3 * MAX_SEALED_BYTES


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "?", "media": "s3://b/1.jpg"},
        {"prompt": "?", "media": ["s3://b/1.jpg", {"type": "video", "uri": "s3://b/2", "fps": 1}]},
        {
            "prompt": "?",
            "generation": {"max_new_tokens": 5, "stop": ["."]},
            "thinking": "think",
            "metadata": {"a": [1]},
        },
        {"messages": {"role": "user", "content": "?"}},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "s3://b/1.jpg"}}, "?"]}]},
    ],
)
def test_a_line_has_the_fields_of_submit(tmp_path: Path, fields: dict[str, Any]) -> None:
    (line,) = lines_of(tmp_path / "in.jsonl", json.dumps(fields).encode())
    assert build_job(line.asked) == build_job(fields)  # type: ignore[arg-type]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(max_size=12) | st.sampled_from([GOOD, b'{"custom_id":"\xed\xa0\x80"}', b'"', b";", b","])))
@example([b"", b"\xef\xbb\xbf", b"\r"])
def test_each_line_comes_once_whatever_is_in_it(tmp_path_factory: pytest.TempPathFactory, parts: list[bytes]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    content = b"\n".join(parts)
    found = lines_of(path, content)
    texts = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    assert [line.number for line in found] == [number for number, text in enumerate(texts, 1) if text.strip()]
    reads_on_from_anywhere(JsonLines, path)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from([b'"', b"\n", b",", b"a", b"\r\n", b"\xff", b'""', b'"b"', b'\n"', b'",']), max_size=30)
)
def test_a_table_reads_on_from_any_of_its_rows(tmp_path_factory: pytest.TempPathFactory, parts: list[bytes]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_bytes(b"prompt,media\n" + b"".join(parts))
    reads_on_from_anywhere(Table, path)


def reads_on_from_anywhere(kind: type[JsonLines] | type[Table], path: Path) -> None:
    source = kind(str(path))
    at_once, positions = [], [Position()]
    for line in source.lines():
        at_once.append(told(line))
        positions.append(source.position)
        assert told(source.read(line.number, line.start)) == told(line)
    source.close()
    starts = [start for _, start, *_ in at_once]
    assert starts == sorted(set(starts))
    for number, position in enumerate(positions):
        later = kind(str(path))
        later.go_to(position)
        assert [told(line) for line in later.lines()] == at_once[number:]
        assert later.share() == 1
        later.close()


def test_what_was_read_must_stay_and_more_may_follow(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(GOOD + b"\n")
    source = JsonLines(str(path))
    lines = source.lines()
    assert next(lines).number == 1
    with path.open("ab") as file:
        file.write(GOOD + b"\n")
    assert source.share() == 1
    assert next(lines).number == 2
    source.go_to(source.position)
    source.close()
    for changed in (GOOD + b"\n" + GOOD[:-2], GOOD.upper() + b"\n" + GOOD + b"\n", b""):
        path.write_bytes(changed)
        later = JsonLines(str(path))
        with pytest.raises(InvalidBatch, match="is not what it was: its first 2 lines were read before"):
            later.go_to(source.position)
        later.close()


def test_a_file_that_cannot_be_read_is_told() -> None:
    """As by a disk that fails, or a share that is gone."""
    with pytest.raises(InvalidBatch, match="/proc/self/mem cannot be read: Input/output error"):
        open_file("/proc/self/mem")
    source = JsonLines("/proc/self/mem")
    with pytest.raises(InvalidBatch, match="/proc/self/mem cannot be read: Input/output error"):
        list(source.lines())
    source.close()


def test_a_line_that_went_away_is_told(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    (line,) = lines_of(path, GOOD)
    source = JsonLines(str(path))
    path.write_bytes(b"")
    with pytest.raises(InvalidBatch, match="has no line 1 any more"):
        source.read(line.number, line.start)
    source.close()


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("in.jsonl.gz", b"\x1f\x8b\x08\0", "looks like gzip. Give lines of JSON, or a table"),
        ("in.jsonl.zst", b"\x28\xb5\x2f\xfd\x04", "looks like an archive"),
        ("in.csv", b"PK\x03\x04\x14", "looks like a ZIP archive"),
        ("in.jsonl", "\ufeff{}\n".encode("utf-16-le"), "looks like UTF-16"),
        ("in.csv", "\ufeffprompt\n".encode("utf-16-be"), "looks like UTF-16"),
        ("cat.jpg", b"\xff\xd8\xff\xe0", "looks like JPEG"),
        ("in.json", b'[{"prompt": "?"}]', "jq -c '.[]' "),
        ("in.json", b'\xef\xbb\xbf[\n  {\n    "prompt": "?"\n  }\n]', "jq -c '.[]' "),
        ("in.json", b'{\r\n  "prompt": "?"\r\n}', "jq -c . "),
    ],
)
def test_another_kind_of_file_is_told(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InvalidBatch) as told:
        open_file(str(path))
    assert sentence in str(told.value)


@pytest.mark.parametrize("content", [b"", b"[1]\n" + GOOD, b"\xff\xd8", "媒体".encode(), b"{\n" + GOOD, b"\0\0"])
def test_a_first_line_that_is_wrong_costs_itself(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "in"
    path.write_bytes(content)
    source = open_file(str(path))
    assert len(list(source.lines())) == len(content.splitlines())
    source.close()
