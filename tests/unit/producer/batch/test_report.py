"""What a page about a batch says, of a few lines and of very many."""

import json
import os
import re
import sqlite3
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from keye import ErrorCode, InvalidBatch
from keye.config.job import AnalysisJob
from keye.producer.batch.journal import Journal
from keye.producer.batch.progress import BatchProgress
from keye.producer.batch.report.chart import Bar, ticks
from keye.producer.batch.report.gallery import MAX_ANSWERS, Spread
from keye.producer.batch.report.markup import Excerpt
from keye.producer.batch.report.page import Answer, Asked, Failures, Page, Totals, write_page
from keye.producer.batch.report.report import write_report
from keye.producer.batch.report.thumbnails import MAX_BYTES, Thumbnail
from keye.testing import MemoryClient
from tests.support.conditions import eventually

Write = Callable[..., Path]


@pytest.fixture
def source(tmp_path: Path) -> Write:
    def write(*lines: dict[str, Any]) -> Path:
        path = tmp_path / "in.jsonl"
        path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        return path

    return write


def reply(job: AnalysisJob) -> str | ErrorCode:
    prompt = job.prompt or "chat"
    return ErrorCode(prompt.partition(" ")[2]) if prompt.startswith("fail ") else f"of {prompt}"


def report_of(source: Path, folder: Path, prompt: str | None = None, **options: Any) -> str:
    with MemoryClient(reply) as client:
        ended = client.submit_batch(source, folder / "out.jsonl", prompt, report=folder / "r.html", **options).wait(30)
    assert ended.trouble == ""
    return (folder / "r.html").read_text()


def test_it_says_what_was_asked_and_how_it_went(source: Write, tmp_path: Path) -> None:
    openai = {"messages": [{"role": "user", "content": [{"type": "text", "text": "what openai asks"}]}]}
    given = source(
        {"custom_id": "first"},
        {"custom_id": "second", "prompt": "my own question"},
        {"custom_id": "third", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m", **openai}},
        {"custom_id": "fourth", "prompt": "fail MEDIA_CORRUPT"},
        {"custom_id": "fifth", "prompt": "fail MEDIA_CORRUPT"},
        {"custom_id": "sixth", "promt": "odd"},
    )
    page = report_of(given, tmp_path, "the common question", thinking="no_think", generation={"max_new_tokens": 7})
    for told in (
        "<h1>in.jsonl</h1>",
        "the common question",
        "answered by keye.testing",
        "thinking: no_think",
        "max_new_tokens: 7",
        "50.0 %",
        "of the common question",
        "my own question",
        "of my own question",
        "what openai asks",
        "<code>MEDIA_CORRUPT</code>",
        "2 lines",
        "<li>fourth</li>",
        "<li>fifth</li>",
        "1 fault: promt: is no field here: did you mean prompt?",
        "<li>sixth</li>",
        "All of them; they are in out.errors.jsonl too.",
    ):
        assert told in page, told
    assert page.count("as the test said") == 1
    assert page.count(">the common question<") == 1


def test_failures_are_called_by_their_lines_in_either_form(source: Write, tmp_path: Path) -> None:
    given = source(
        {"custom_id": "theirs", "body": {"messages": [], "tools": [{}]}},
        {"custom_id": "theirs", "body": {"messages": []}},
        {"custom_id": "theirs"},
    )
    page = report_of(given, tmp_path)
    for name in ("theirs", "without custom_id", "line 3"):
        assert f"<li>{name}</li>" in page


@pytest.mark.holds(
    "docs/batches.md#how-do-i-look-at-it",
    "Given again after all has ended",
)
def test_it_is_written_again_after_all_has_ended_and_after_the_input_has_gone(source: Write, tmp_path: Path) -> None:
    given = source({"custom_id": "a", "prompt": "one"})
    report_of(given, tmp_path)
    (tmp_path / "r.html").unlink()
    assert "of one" in report_of(given, tmp_path)


def test_of_a_time_that_is_not_known_it_says_nothing(source: Write, tmp_path: Path) -> None:
    given = source({"custom_id": "a", "prompt": "one"})
    assert re.search(r"[\d.]+ s · \d+ tokens read", report_of(given, tmp_path))
    # As of a line in OpenAI's form that was written when its runner died.
    with closing(sqlite3.connect(tmp_path / "out.jsonl.journal")) as db, db:
        db.execute("update lines set seconds = null")
    assert re.search(r">\d+ tokens read", report_of(given, tmp_path))


def test_of_nothing_it_says_so(source: Write, tmp_path: Path) -> None:
    page = report_of(source(), tmp_path)
    assert '<dt>lines</dt><dd class="number">0</dd>' in page
    assert "<figure" not in page


def test_of_a_batch_that_was_stopped_it_says_so(source: Write, tmp_path: Path) -> None:
    given = source({"custom_id": "a", "prompt": "one"}, {"custom_id": "b", "prompt": "two"})
    with MemoryClient() as client:
        batch = client.submit_batch(given, tmp_path / "out.jsonl", report=tmp_path / "r.html", max_in_flight=1)
        eventually(lambda: client.jobs)
        batch.stop()
    page = (tmp_path / "r.html").read_text()
    assert "not ended" in page
    assert "read so far, and more to come" in page


def test_a_batch_that_was_stopped_waits_for_its_report(
    source: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*given: Any) -> Any:
        time.sleep(0.5)
        return write_report(*given)

    monkeypatch.setattr("keye.producer.batch.batch.STOP_SECONDS", 0.1)
    monkeypatch.setattr("keye.producer.batch.opening.write_report", slow)
    with MemoryClient() as client:
        batch = client.submit_batch(source({"prompt": "one"}), tmp_path / "out.jsonl", report=tmp_path / "r.html")
        eventually(lambda: client.jobs)
        batch.stop()
        assert (tmp_path / "r.html").exists()


@pytest.mark.parametrize(
    "path", ["nowhere/r.html", "in.jsonl/r.html", ".", "out.jsonl", "out.jsonl.journal", "in.jsonl"]
)
def test_a_path_that_takes_no_report_is_told_before_anything_is_sent(source: Write, tmp_path: Path, path: str) -> None:
    given = source({"custom_id": "a", "prompt": "one"})
    before = given.read_text()
    with MemoryClient(reply) as client, pytest.raises(InvalidBatch, match=r"report|is no file"):
        client.submit_batch(given, tmp_path / "out.jsonl", report=tmp_path / path)
    assert client.jobs == []
    assert [each.name for each in tmp_path.iterdir()] == ["in.jsonl"]
    assert given.read_text() == before


def test_no_device_is_replaced(source: Write, tmp_path: Path) -> None:
    with MemoryClient(reply) as client, pytest.raises(InvalidBatch, match="is no file"):
        client.submit_batch(source({"prompt": "one"}), tmp_path / "out.jsonl", report="/dev/null")
    assert not Path("/dev/null").is_file()


def test_a_report_that_cannot_be_written_at_the_end_loses_no_answer(source: Write, tmp_path: Path) -> None:
    (tmp_path / "pages").mkdir()
    report = tmp_path / "pages" / "r.html"
    with MemoryClient() as client:
        batch = client.submit_batch(source({"custom_id": "a", "prompt": "?"}), tmp_path / "out.jsonl", report=report)
        eventually(lambda: client.jobs)
        (tmp_path / "pages").rmdir()
        client.answer(client.jobs[0], "an answer")
        ended = batch.wait(30)
    assert (ended.answered, ended.failed) == (1, 0)
    assert ended.trouble.startswith(f"The report {report} cannot be written: No such file or directory.")
    assert json.loads((tmp_path / "out.jsonl").read_text())["answer"] == "an answer"


def test_who_looks_at_it_meanwhile_sees_a_whole_page_that_he_may_read(source: Write, tmp_path: Path) -> None:
    given = source({"custom_id": "a", "prompt": "one"})
    (tmp_path / "r.html").write_text("the one before")
    before = (tmp_path / "r.html").open()
    mask = os.umask(0o027)
    try:
        report_of(given, tmp_path)
    finally:
        os.umask(mask)
    assert before.read() == "the one before"
    before.close()
    assert (tmp_path / "r.html").stat().st_mode & 0o777 == 0o640
    assert {each.suffix for each in tmp_path.iterdir()} == {".html", ".jsonl", ".journal"}


SECRETS = "https://h/a?sig=SECRET data:a/b;base64,SECRET"
HOSTILE = f"\"'><script>alert(1)</script><img src=x onerror=alert(1)>\u202e\x1b]0;{SECRETS}"


@pytest.mark.holds(
    "docs/batches.md#how-do-i-look-at-it",
    "Queries of URLs, which hold signatures",
)
def test_nothing_that_strangers_wrote_gets_out_of_its_place(source: Write, tmp_path: Path) -> None:
    media = ("https://u:SECRET@h/a.png?sig=SECRET", "data:image/png;base64,SECRETSECRET")
    media = [{"type": "image", "uri": uri} for uri in media]
    given = source(
        {"custom_id": HOSTILE, "prompt": HOSTILE, "media": media, "metadata": {HOSTILE: HOSTILE}},
        {"custom_id": f"{HOSTILE}2", HOSTILE: 1},
    )
    given = given.rename(tmp_path / "<script>alert(2)<.jsonl")
    page = report_of(given, tmp_path, f"{HOSTILE}!")
    assert page.count("<script") == page.count("SECRET") == page.count("<img src=x") == 0
    assert page.count("&lt;script&gt;alert(1)") >= 4
    assert not [char for char in page if not (char.isprintable() or char == "\n")]


def made(folder: Path, num_lines: int) -> tuple[Journal, tuple[Path, Path], BatchProgress]:
    """A batch of so many lines, of which every tenth failed, the last ones by a code of their own."""
    journal = Journal(str(folder / "out.jsonl.journal"), "{}")
    journal.close()
    num_failed = num_lines // 10
    with closing(sqlite3.connect(folder / "out.jsonl.journal")) as db, db:
        db.execute(
            "with recursive n(i) as (select 1 union all select i + 1 from n where i < ?) insert into lines (number, "
            "start, custom_id, is_openai, state, sent_at, ended_at, seconds, code) select i, 0, 'line-' || i, 0, "
            "iif(i % 10, 2, 3), 0, 1e9 + i, iif(i % 10, i % 100 / 10.0, null), "
            "iif(i % 10, null, iif(i > ? - 30, 'MEDIA_TOO_LARGE', 'MEDIA_CORRUPT')) from n",
            (num_lines, num_lines),
        )
        db.execute("update batch set begun_at = 1e9")
    result = {"answer": "x", "reasoning": None, "finish_reason": "stop", "model": {"name": "m"}}
    result["usage"] = {"prompt_tokens": 1, "completion_tokens": 1}
    with (folder / "out.jsonl").open("w") as answers, (folder / "out.errors.jsonl").open("w") as errors:
        for number in range(1, num_lines + 1):
            line = {"custom_id": f"line-{number}", "line": number}
            if number % 10:
                answers.write(json.dumps({**line, **result}) + "\n")
            else:
                code = "MEDIA_TOO_LARGE" if number > num_lines - 30 else "MEDIA_CORRUPT"
                errors.write(json.dumps({**line, "code": code, "message": f"line {number}: why"}) + "\n")
    progress = BatchProgress(num_lines, num_lines - num_failed, num_failed, 0, 1.0, True, "", True, 0, 0)
    journal = Journal(str(folder / "out.jsonl.journal"), "{}")
    return journal, (folder / "out.jsonl", folder / "out.errors.jsonl"), progress


@pytest.fixture
def traced() -> Iterator[Callable[[], int]]:
    """Gives the most bytes that Python has held since."""
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()


@pytest.mark.holds(
    "docs/batches.md#how-do-i-look-at-it",
    "up to 200 answers from all over the batch",
)
def test_of_many_lines_it_shows_some_from_all_over_in_flat_memory(tmp_path: Path, traced: Callable[[], int]) -> None:
    journal, outputs, progress = made(tmp_path, 30_000)
    tracemalloc.reset_peak()
    with closing(journal):
        write_report(tmp_path / "r.html", "in", {}, None, progress, journal, outputs, lambda row: {"prompt": "?"})
    # Of each answer there are eight bytes, in order: for the median.
    assert traced() < 6 * 2**20
    page = (tmp_path / "r.html").read_text()
    assert "200 of 27,000 answers, from all over the batch. All are in out.jsonl." in page
    numbers = [int(text.partition("<")[0].replace(",", "")) for text in page.split('class="note">line ')[1:]]
    assert len(numbers) == MAX_ANSWERS
    assert all(0 < after - before < 400 for before, after in pairwise(numbers))
    assert (numbers[0], numbers[-1] > 29_800) == (1, True)
    # The rare failure is shown beside the common one.
    assert "53 of 3,000 failures" in page
    assert "<code>MEDIA_TOO_LARGE</code>" in page
    assert "Half of the answers came within 4.9 s of being sent, 95 of 100 within 9.5 s, all within 9.9 s" in page
    assert len(page) < 200_000


@pytest.mark.holds(
    "docs/batches.md#how-do-i-look-at-it",
    "It has at most 5 MB",
)
def test_at_its_largest_it_has_5_mb() -> None:
    text = Excerpt.of("<" * 2**20, 2400)
    thumbnail = Thumbnail("n" * 300, bytes(MAX_BYTES))
    answer = Answer("&" * 300, 10**9, Excerpt.of('"' * 2**20, 900), text, text, "m", ["f" * 99], [thumbnail], 64)
    failures = Failures("C" * 300, "m" * 100, 10**9, {f"{index}" * 500: ["&" * 300] for index in range(100)})
    bars = [Bar(index, index + 1, 10**6, 10**6) for index in range(41)]
    asked, totals = Asked("i" * 300, text, ["f" * 300] * 9), Totals(10**9, 10**9, 10**9, False, 0, 1e9)
    page = Page(asked, totals, 1, bars, None, [failures], [answer] * 200, ["l" * 99], ("o" * 300, "e" * 300), 0)
    assert 4_000_000 < len(write_page(page).encode()) < 5_000_000


def test_a_spread_takes_all_of_few_and_some_of_many() -> None:
    for count, most in ((0, 5), (1, 5), (5, 5), (6, 5), (1000, 7)):
        spread = Spread(count, most)
        taken = [index for index in range(count) if spread.takes_next()]
        assert len(taken) == min(count, most)
        assert count < 6 or taken[-1] >= count * (1 - 2 / most)


@pytest.mark.parametrize(("most", "told"), [(1, [0, 1]), (7, [0, 2, 4, 6, 8]), (100, [0, 20, 40, 60, 80, 100])])
def test_axes_have_round_numbers(most: int, told: list[int]) -> None:
    assert ticks(most, is_whole=True) == told
