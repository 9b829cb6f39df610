"""What a batch does with its lines, whatever they hold: who answers is the test."""

import asyncio
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from keye import AsyncClient, Client, ErrorCode, InvalidBatch, InvalidJob, QueueUnavailable
from keye.config.job import AnalysisJob, Priority, Thinking
from keye.producer.batch.batch import OUTAGE_SECONDS
from keye.testing import MemoryClient
from tests.support.conditions import eventually


@pytest.fixture
def source(tmp_path: Path) -> Callable[..., Path]:
    def write(*lines: dict[str, Any] | str) -> Path:
        path = tmp_path / "in.jsonl"
        path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
        return path

    return write


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def errors_of(output: Path) -> list[dict[str, Any]]:
    return read(output.with_suffix(".errors.jsonl"))


def echo(job: AnalysisJob) -> str | ErrorCode:
    return ErrorCode.MEDIA_CORRUPT if job.prompt == "spoil" else f"of {job.prompt}"


Write = Callable[..., Path]


@pytest.mark.holds(
    "docs/batches.md#what-can-the-input-be",
    "A line that asks nothing that can be answered costs itself alone",
    "So does a second line of the same `custom_id`",
)
@pytest.mark.holds(
    "docs/batches.md#what-does-it-write",
    "`captions.jsonl` has a line of JSON for each answer",
    "has for each line without an answer its `custom_id`, line",
)
def test_each_line_stands_once_in_the_answers_or_the_errors(source: Write, output: Path) -> None:
    given = source({"custom_id": "a", "prompt": "one"}, "", "no JSON", {"prompt": "spoil"}, {"custom_id": "a"}, {})
    with MemoryClient(echo) as client:
        ended = client.submit_batch(given, output).wait(30)
    assert (ended.lines, ended.answered, ended.failed, ended.in_flight) == (5, 1, 4, 0)
    assert (ended.share, ended.is_read, ended.trouble, ended.ended_before) == (1.0, True, "", 0)
    (answer,) = read(output)
    assert (answer["custom_id"], answer["line"], answer["answer"]) == ("a", 1, "of one")
    failed = {(line["line"], line["custom_id"], line["code"]) for line in errors_of(output)}
    assert failed == {
        (3, None, "INVALID_JOB"),
        (4, "line-4", "MEDIA_CORRUPT"),
        (5, None, "INVALID_JOB"),
        (6, "line-6", "INVALID_JOB"),
    }
    messages = {line["line"]: line["message"] for line in errors_of(output)}
    assert messages[3] == "line 3: 1 fault: job: is no JSON (Expecting value, character 1)"
    assert messages[5] == "line 5: 1 fault: custom_id: 'a' is that of line 1 too"


@pytest.mark.holds(
    "docs/batches.md#what-can-the-input-be",
    "are for all that do not say their own",
    "Jobs of a batch are of low priority",
)
def test_what_all_lines_share_is_for_those_that_do_not_say_their_own(source: Write, output: Path) -> None:
    given = source(
        {"custom_id": "plain"},
        {"custom_id": "own", "prompt": "mine", "thinking": "think", "priority": "high", "generation": {"seed": 1}},
        {"custom_id": "chat", "messages": [{"role": "user", "content": "hello"}]},
    )
    with MemoryClient(lambda job: "yes") as client:
        client.submit_batch(given, output, "theirs", thinking="no_think", generation={"max_new_tokens": 7}).wait(30)
        plain, own, chat = (client.asked(job) for job in client.jobs)
    assert (plain.prompt, plain.thinking, plain.priority) == ("theirs", Thinking.NO_THINK, Priority.LOW)
    assert plain.generation.max_new_tokens == own.generation.max_new_tokens == 7
    assert (own.prompt, own.thinking, own.priority, own.generation.seed) == ("mine", Thinking.THINK, Priority.HIGH, 1)
    assert chat.prompt is None
    assert chat.messages is not None


@pytest.mark.holds(
    "docs/batches.md#what-does-it-write",
    "Lines stand in the order in which they ended",
)
@pytest.mark.holds(
    "docs/batches.md#from-python",
    "`batch.stop()` ends it, to be gone on with",
)
def test_a_batch_that_was_stopped_goes_on_where_it_was(source: Write, output: Path) -> None:
    given = source(*({"custom_id": f"a{number}", "prompt": "?"} for number in range(5)))
    with MemoryClient() as client:
        batch = client.submit_batch(given, output)
        eventually(lambda: batch.progress.in_flight == 5)
        client.answer(client.jobs[2], "early")
        eventually(lambda: batch.progress.answered == 1)
        with pytest.raises(TimeoutError):
            batch.wait(0.01)
        batch.stop()
        assert batch.wait(0) == batch.progress
        assert batch.progress.ended == 1
        # It ends while nobody looks.
        client.answer(client.jobs[0], "late")
        batch = client.submit_batch(given, output)
        eventually(lambda: batch.progress.answered == 2)
        assert len(client.jobs) == 5, "some were sent twice"
        for number in (1, 3, 4):
            client.answer(client.jobs[number], "at last")
        assert batch.wait(30).answered == 5
    assert [line["custom_id"] for line in read(output)][:2] == ["a2", "a0"]
    assert {line["custom_id"]: line["answer"] for line in read(output)} == {
        "a0": "late",
        "a2": "early",
        **dict.fromkeys(("a1", "a3", "a4"), "at last"),
    }


def test_lines_that_come_later_are_run_by_the_same_call(source: Write, output: Path) -> None:
    with MemoryClient(echo) as client:
        given = source({"custom_id": "a", "prompt": "1"})
        assert client.submit_batch(given, output).wait(30).answered == 1
        with given.open("a") as file:
            file.write('{"custom_id": "b", "prompt": "2"}\n')
        assert client.submit_batch(given, output).wait(30).answered == 2
        assert len(client.jobs) == 2
    assert [line["answer"] for line in read(output)] == ["of 1", "of 2"]


@pytest.mark.holds(
    "docs/batches.md#what-does-it-write",
    "With `--retry-failed` the same command runs again what failed",
)
def test_what_failed_is_run_again_where_that_is_asked_and_only_then(source: Write, output: Path) -> None:
    given = source({"prompt": "one"}, {"prompt": "spoil"}, {"prompt": "two"}, "no JSON")
    with MemoryClient(echo) as client:
        client.submit_batch(given, output).wait(30)
        assert client.submit_batch(given, output).wait(30).ended_before == 4
        assert len(client.jobs) == 3
    with MemoryClient(lambda job: "mended") as client:
        ended = client.submit_batch(given, output, retry_failed=True).wait(30)
        assert (ended.answered, ended.failed) == (3, 1)
        (job,) = client.jobs
        assert client.asked(job).prompt == "spoil"
    assert [line["line"] for line in read(output)] == [1, 3, 2]
    assert [line["line"] for line in errors_of(output)] == [4]


@pytest.mark.holds(
    "docs/batches.md#what-does-it-write",
    "`IDEMPOTENCY_CONFLICT` | has an",
)
def test_lines_of_one_idempotency_key_are_one_job_and_an_answer_each(source: Write, output: Path) -> None:
    ask = {"prompt": "one", "idempotency_key": "order 7"}
    given = source({"custom_id": "a", **ask}, {"custom_id": "b", **ask}, {"custom_id": "c", **ask, "prompt": "other"})
    with MemoryClient(echo) as client:
        ended = client.submit_batch(given, output).wait(30)
        assert len(client.jobs) == 1
    assert (ended.answered, ended.failed) == (2, 1)
    assert {line["custom_id"]: line["answer"] for line in read(output)} == {"a": "of one", "b": "of one"}
    assert [(line["custom_id"], line["code"]) for line in errors_of(output)] == [("c", "IDEMPOTENCY_CONFLICT")]


@pytest.mark.holds(
    "docs/batches.md#how-do-i-ask-about-a-whole-bucket-or-a-file-of-a-million-questions",
    "It reads as far ahead as it has jobs in flight",
)
def test_no_more_are_in_flight_than_asked_for(source: Write, output: Path) -> None:
    given = source(*({"prompt": "?"} for _ in range(20)))
    with MemoryClient() as client:
        batch = client.submit_batch(given, output, max_in_flight=3)
        for number in range(20):
            eventually(lambda number=number: len(client.jobs) > number)
            assert batch.progress.in_flight <= 3
            assert len(client.jobs) <= number + 3
            client.answer(client.jobs[number], "yes")
        assert batch.wait(30).answered == 20


def test_a_full_queue_is_waited_for_and_told_of(source: Write, output: Path) -> None:
    given = source(*({"prompt": "?"} for _ in range(4)))
    with MemoryClient(max_queue_depth=1) as client:
        batch = client.submit_batch(given, output)
        eventually(lambda: "KEYE_MAX_QUEUE_DEPTH" in batch.progress.trouble)
        for number in range(4):
            eventually(lambda number=number: len(client.jobs) > number)
            client.answer(client.jobs[number], "yes")
        assert batch.wait(30)[:3] == (4, 4, 0)
        assert batch.progress.trouble == ""


class Dying(MemoryClient):
    """Its batch ends when something is sent."""

    def send(self, *jobs: Any, **options: Any) -> Any:
        raise RuntimeError("dead")


def test_what_was_about_to_be_sent_to_a_queue_that_is_full_by_then_is_answered_once(
    source: Write, output: Path
) -> None:
    given = source(*({"prompt": "?"} for _ in range(6)))
    with Dying() as client, pytest.raises(RuntimeError):
        client.submit_batch(given, output, max_in_flight=3).wait(30)
    with MemoryClient(max_queue_depth=1) as client:
        batch = client.submit_batch(given, output, max_in_flight=3)
        for number in range(6):
            eventually(lambda number=number: len(client.jobs) > number)
            client.answer(client.jobs[number], "yes")
        assert batch.wait(30)[:3] == (6, 6, 0)
    assert [line["line"] for line in read(output)] == [1, 2, 3, 4, 5, 6]


def test_what_failed_under_a_key_runs_again_though_its_retry_died(
    source: Write, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = source({"prompt": "?", "idempotency_key": "order 7"})
    with MemoryClient() as client:
        batch = client.submit_batch(given, output)
        eventually(lambda: batch.progress.in_flight == 1)
        client.start(client.jobs[0])
        client.fail(client.jobs[0], ErrorCode.MEDIA_CORRUPT)
        assert batch.wait(30).failed == 1
        with monkeypatch.context() as dying:
            dying.setattr(client, "send", Dying.send)
            batch = client.submit_batch(given, output, retry_failed=True)
            with pytest.raises(RuntimeError):
                batch.wait(30)
        batch = client.submit_batch(given, output)
        eventually(lambda: len(client.jobs) == 2)
        client.answer(client.jobs[1], "yes")
        assert batch.wait(30)[:3] == (1, 1, 0)


def test_it_runs_where_no_folder_is_opened_and_no_read_can_be_told_not_to_wait(
    source: Write, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on Windows.
    for name in ("O_NONBLOCK", "O_DIRECTORY"):
        monkeypatch.delattr(os, name)
    with MemoryClient(lambda job: "yes") as client:
        assert client.submit_batch(source({"prompt": "?"}), output).wait(30).answered == 1


@pytest.mark.parametrize(
    ("own_seconds", "away_seconds", "code"),
    [
        (None, 3000, "JOB_LOST"),
        (60, 3000, "OUTCOME_EXPIRED"),
        (7200, 5000, "JOB_LOST"),
        (7200, 8000, "OUTCOME_EXPIRED"),
    ],
)
def test_how_long_a_job_says_it_is_kept_tells_what_became_of_it(
    tmp_path: Path,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    own_seconds: int | None,
    away_seconds: int,
    code: str,
) -> None:
    monkeypatch.setattr(MemoryClient, "kept_seconds", lambda self: 3600.0)
    given = tmp_path / "in.csv"
    given.write_text(f"prompt,result_ttl_seconds\n?,{own_seconds or ''}\n")
    with MemoryClient() as client:
        batch = client.submit_batch(given, output)
        eventually(lambda: batch.progress.in_flight == 1)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + away_seconds)
    with MemoryClient() as client:
        client.submit_batch(given, output).wait(30)
    assert [line["code"] for line in errors_of(output)] == [code]


@pytest.mark.parametrize("max_in_flight", [0, -1])
def test_a_batch_that_may_send_nothing_is_refused(source: Write, output: Path, max_in_flight: int) -> None:
    with MemoryClient() as client, pytest.raises(InvalidBatch, match=r"max_in_flight is .* Give 1 or more"):
        client.submit_batch(source({"prompt": "?"}), output, max_in_flight=max_in_flight)


def test_a_priority_that_is_said_is_that_which_goes_without_saying(source: Write, output: Path) -> None:
    given = source({"prompt": "?"})
    with MemoryClient(lambda job: "yes") as client:
        client.submit_batch(given, output).wait(30)
        assert client.submit_batch(given, output, priority="low").wait(30).answered == 1


@pytest.mark.parametrize("change", [{"prompt": "other"}, {"thinking": "think"}])
def test_another_question_is_another_batch(source: Write, output: Path, change: dict[str, Any]) -> None:
    given = source({"media": ["s3://photos/1.jpg"]})
    with MemoryClient(lambda job: "yes") as client:
        client.submit_batch(given, output, "What is it?").wait(30)
        before = output.read_bytes()
        with pytest.raises(InvalidBatch, match=r"out\.jsonl\.journal is that of a batch that asks something else"):
            client.submit_batch(given, output, **{"prompt": "What is it?", **change})
        assert output.read_bytes() == before


def test_what_was_read_must_stay_as_it_was(source: Write, output: Path) -> None:
    with MemoryClient(lambda job: "yes") as client:
        client.submit_batch(source({"prompt": "1"}), output).wait(30)
        with pytest.raises(InvalidBatch, match="its first 1 lines were read before, and have changed since"):
            client.submit_batch(source({"prompt": "2"}), output)


@pytest.mark.holds(
    "docs/batches.md#from-python",
    "It raises `InvalidBatch` where the input",
)
def test_an_output_of_somebody_else_is_not_written_to(source: Write, output: Path) -> None:
    output.write_text("mine\n")
    with MemoryClient() as client, pytest.raises(InvalidBatch, match="is there already"):
        client.submit_batch(source({"prompt": "1"}), output)
    assert output.read_text() == "mine\n"


def test_options_of_no_job_are_refused_at_once(source: Write, output: Path) -> None:
    with MemoryClient() as client:
        with pytest.raises(InvalidJob, match="thinking"):
            client.submit_batch(source({"prompt": "?"}), output, thinking="hard")
        with pytest.raises(InvalidJob, match="max_tokens"):
            client.submit_batch(source({"prompt": "?"}), output, max_tokens=7)  # type: ignore[call-arg]
    assert not output.with_name("out.jsonl.journal").exists()


def test_one_process_has_a_batch_at_a_time(source: Write, output: Path) -> None:
    given = source({"prompt": "?"})
    with MemoryClient() as client:
        batch = client.submit_batch(given, output)
        with pytest.raises(InvalidBatch, match="is in use: this batch is running already"):
            client.submit_batch(given, output)
        batch.stop()
        client.submit_batch(given, output).stop()


def test_a_client_that_is_closed_stops_its_batches(source: Write, output: Path) -> None:
    with MemoryClient() as client:
        batch = client.submit_batch(source({"prompt": "?"}), output)
        eventually(lambda: batch.progress.in_flight == 1)
    assert batch.wait(0).in_flight == 1


@pytest.mark.holds(
    "docs/batches.md#from-python",
    "`AsyncClient` has the same, with `await`",
)
def test_tasks_of_asyncio_wait_for_a_batch(source: Write, output: Path) -> None:
    given = source({"custom_id": "a", "prompt": "?"})

    async def run() -> None:
        async with AsyncClient(memory := MemoryClient()) as client:
            batch = await client.submit_batch(given, output)
            with pytest.raises(TimeoutError):
                await batch.wait(0.01)
            await asyncio.to_thread(eventually, lambda: batch.progress.in_flight == 1)
            memory.answer(memory.jobs[0], "yes")
            assert (await batch.wait(30)).answered == 1
            assert batch.errors_path == output.with_suffix(".errors.jsonl")
            stopped = await client.submit_batch(given, output)
            await stopped.stop()

    asyncio.run(run())
    assert read(output)[0]["answer"] == "yes"


@pytest.mark.holds(
    "docs/batches.md#what-if-something-dies",
    "Redis | the command waits for ten minutes",
)
def test_a_redis_that_refuses_for_too_long_ends_it(
    source: Write, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert OUTAGE_SECONDS == 600
    monkeypatch.setattr("keye.producer.batch.batch.OUTAGE_SECONDS", 0.1)
    monkeypatch.setattr("keye.producer.batch.batch.PAUSE_SECONDS", 0.05)
    with Client("redis://127.0.0.1:1/0") as client:
        batch = client.submit_batch(source({"prompt": "?"}), output)
        with pytest.raises(QueueUnavailable):
            batch.wait(60)
    assert read(output) == errors_of(output) == []
    with MemoryClient(lambda job: "yes") as client:
        assert client.submit_batch(source({"prompt": "?"}), output).wait(30).answered == 1
