"""The command `keye` with several questions and with schemas: what it sends, and what it prints."""

import json
from pathlib import Path

import pytest
from redis import Redis
from typer.testing import CliRunner

from keye.config import keys
from keye.config.event import TextGenerated
from keye.producer import Client, ErrorCode, Job, JobResult
from keye.producer.cli import app
from keye.producer.shell import ExitCode
from keye.testing import MemoryClient
from tests.support.worker_side import asked, settle, start

COLOUR = {"type": "object", "properties": {"colour": {"type": "string"}}, "required": ["colour"]}


def settle_with(redis: Redis, job: Job, *said: str | ErrorCode) -> JobResult:
    client = MemoryClient(lambda job: said)
    result = client.submit(**{**asked(job, redis), "idempotency_key": None}).result(1)
    settle(redis, job, result.model_copy(update={"job_id": job.id}))
    return result


def write(redis: Redis, job: Job, text: str, offset: int, question: int) -> None:
    place = {"offset": offset, "question": question}
    event = TextGenerated(channel="answer", text=text, num_tokens=1, attempt=1, at=0, **place)
    redis.xadd(keys.events(job.id), {"event": event.model_dump_json()})


@pytest.mark.holds(
    "docs/answers.md#answers-that-fit",
    "`--also QUESTION` asks another about the same media",
    'keye submit "Is anybody running?"',
    "Where one of several questions has no answer the others are printed, and the exit code is 3.",
)
def test_further_questions_are_said_by_also_and_each_answer_is_printed(
    keye: CliRunner, client: Client, redis: Redis
) -> None:
    sent = keye.invoke(app, ["submit", "What is it?", "/srv/a.mp4", "--also", "Which colour?", "--also", "为什么?"])
    job = client.find(sent.stdout.strip())
    assert asked(job, redis).get("prompt") is None
    assert [each["prompt"] for each in asked(job, redis)["questions"]] == ["What is it?", "Which colour?", "为什么?"]
    result = settle_with(redis, job, "a circle", ErrorCode.PROMPT_TOO_LONG, "红色")
    told = keye.invoke(app, ["result", job.id])
    assert told.stdout == "question 1: a circle\nquestion 3: 红色\n"
    assert told.stderr == "question 2: PROMPT_TOO_LONG: as the test said\n"
    assert told.exit_code == ExitCode.JOB_FAILED
    as_json = keye.invoke(app, ["result", job.id, "--json"])
    assert as_json.exit_code == ExitCode.JOB_FAILED
    assert json.loads(as_json.stdout)["answers"] == result.model_dump(mode="json")["answers"]


def test_samples_are_told_apart(keye: CliRunner, client: Client, redis: Redis) -> None:
    job = client.submit(prompt="?", generation={"n": 2})
    settle_with(redis, job, "red", "blue")
    told = keye.invoke(app, ["result", job.id])
    assert (told.stdout, told.exit_code) == ("question 1, sample 1: red\nquestion 1, sample 2: blue\n", ExitCode.OK)


def test_who_watches_sees_the_first_as_it_comes_and_then_the_others(
    keye: CliRunner, client: Client, redis: Redis
) -> None:
    job = client.submit(questions=["What is it?", "Which colour?"])
    start(redis, job)
    for part in range(2):
        write(redis, job, ("a ", "circle")[part], 2 * part, 0)
        write(redis, job, ("r", "ed")[part], part, 1)
    settle_with(redis, job, "a circle", "red")
    lines = keye.invoke(app, ["watch", job.id]).stdout.splitlines()
    assert [line for line in lines if "circle" in line or "red" in line] == ["a circle", "question 2: red"]


@pytest.mark.holds("docs/answers.md#answers-that-fit", "From a shell, `--schema FILE` says what fits")
def test_a_schema_comes_from_a_file(keye: CliRunner, client: Client, redis: Redis, tmp_path: Path) -> None:
    for given in (COLOUR, ["red", "blue"]):
        (tmp_path / "schema.json").write_text(json.dumps(given))
        sent = keye.invoke(app, ["submit", "?", "--schema", str(tmp_path / "schema.json")])
        assert asked(client.find(sent.stdout.strip()), redis)["response_schema"] == given
    sent = keye.invoke(app, ["submit", "?", "--schema", "-"], input=json.dumps(COLOUR))
    assert asked(client.find(sent.stdout.strip()), redis)["response_schema"] == COLOUR


@pytest.mark.parametrize("text", ["{", "null", "", "{'a': 1}", "[" * 100_000])
def test_a_schema_that_is_no_json_is_refused(keye: CliRunner, tmp_path: Path, text: str) -> None:
    (tmp_path / "schema.json").write_text(text)
    for command in (["submit", "?"], ["batch", "run", str(tmp_path), "-o", str(tmp_path / "out.jsonl"), "?"]):
        refused = keye.invoke(app, [*command, "--schema", str(tmp_path / "schema.json")])
        assert refused.exit_code == ExitCode.INVALID
        assert refused.stderr.startswith("1 fault: response_schema: --schema is no JSON (")


def test_a_batch_needs_its_first_question_before_others(keye: CliRunner, tmp_path: Path) -> None:
    refused = keye.invoke(app, ["batch", "run", str(tmp_path), "-o", str(tmp_path / "out.jsonl"), "--also", "Why?"])
    assert refused.exit_code == ExitCode.INVALID
    assert "--also is for another question: give the first too" in refused.stderr
