"""The command `keye` against a real server: what it prints, and its exit codes."""

import json
from base64 import b64encode
from pathlib import Path

import pytest
from redis import Redis
from typer.testing import CliRunner

from keye.producer import Client, JobState
from keye.producer.cli import app
from keye.producer.shell import ExitCode
from tests.support.worker_side import JOB, answer, asked, failure, settle, start


def test_a_job_travels_from_submit_to_result(keye: CliRunner, client: Client, redis: Redis) -> None:
    job = client.find(keye.invoke(app, ["submit", "What is it?", "/srv/cat.png"]).stdout.strip())
    assert asked(job, redis)["media"][0]["uri"] == "/srv/cat.png"
    settle(redis, job, answer(job))
    assert keye.invoke(app, ["result", job.id]).stdout == "a red square\n"
    assert json.loads(keye.invoke(app, ["result", job.id, "--json"]).stdout)["usage"]["visual_tokens"] == 4


@pytest.mark.holds("docs/producers.md#from-python", "`traceparent`, as W3C's Trace Context has it")
def test_a_job_names_the_trace_it_belongs_to_or_is_refused(keye: CliRunner, client: Client, redis: Redis) -> None:
    traceparent = f"00-{'4b' * 16}-{'0f' * 8}-01"
    job = client.find(keye.invoke(app, ["submit", "?", "--traceparent", traceparent]).stdout.strip())
    assert asked(job, redis)["traceparent"] == traceparent
    refused = keye.invoke(app, ["submit", "?", "--traceparent", "4b"])
    assert (refused.exit_code, refused.stderr[:41]) == (ExitCode.INVALID, "1 fault: traceparent: is no traceparent: ")


def test_a_whole_job_comes_from_standard_input(keye: CliRunner, client: Client) -> None:
    submitted = keye.invoke(app, ["submit", "--job", "-", "--json"], input='{"prompt": "?", "priority": "low"}')
    assert client.find(json.loads(submitted.stdout)["job_id"]).state is JobState.QUEUED


@pytest.mark.holds(
    "docs/producers.md#what-a-medium-may-be", "a relative path means the same in Python and in the shell"
)
def test_relative_path_means_the_same_in_the_shell_and_in_python(
    keye: CliRunner, client: Client, redis: Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\xff photo")
    line = json.dumps({"prompt": "?", "media": ["photo.jpg"]})
    ids = [
        keye.invoke(app, ["submit", "?", "photo.jpg"]).stdout.strip(),
        keye.invoke(app, ["submit", "--job", "-"], input=line).stdout.strip(),
        keye.invoke(app, ["submit-many", "-"], input=line).stdout.strip(),
        client.submit(prompt="?", media=["photo.jpg"]).id,
    ]
    (uri,) = {asked(client.find(job_id), redis)["media"][0]["uri"] for job_id in ids}
    assert uri == "data:image/jpeg;base64," + b64encode(b"\xff\xd8\xff photo").decode()
    absent = keye.invoke(app, ["submit", "?", "absent.jpg"])
    assert absent.exit_code == ExitCode.INVALID
    assert absent.stderr == f"1 fault: media.0: there is no 'absent.jpg' in {tmp_path}.\n"


def test_chat_in_openai_s_words_comes_from_the_shell(keye: CliRunner, client: Client, redis: Redis) -> None:
    image = {"type": "image_url", "image_url": {"url": "https://host/cat", "detail": "low"}}
    chat = {"messages": [{"role": "user", "content": [{"type": "text", "text": "?"}, image]}]}
    job = client.find(keye.invoke(app, ["submit", "--job", "-"], input=json.dumps(chat)).stdout.strip())
    assert asked(job, redis)["messages"][0]["content"][1]["max_pixels"] == 512 * 512


@pytest.mark.holds("docs/producers.md#from-python", "`keye submit-many jobs.jsonl` reads a job as JSON")
def test_many_jobs_come_as_lines_and_each_is_told_of(keye: CliRunner, client: Client) -> None:
    lines = '{"prompt": "?", "media": ["/srv/a.png"]}\nno JSON\n{"prompt": "!"}\n'
    sent = keye.invoke(app, ["submit-many", "-"], input=lines)
    first, refused, last = sent.stdout.split("\n")[:3]
    assert (client.find(first).state, refused, client.find(last).state) == (JobState.QUEUED, "", JobState.QUEUED)
    assert sent.stderr.startswith("line 2: 1 fault: ")
    assert sent.exit_code == ExitCode.INVALID


@pytest.mark.holds("docs/producers.md#from-the-shell", "`keye result ID --json` prints its failure")
def test_a_failure_is_told_in_a_line_or_as_json(keye: CliRunner, client: Client, redis: Redis) -> None:
    job = client.submit(JOB)
    settle(redis, job, failure(job))
    told = keye.invoke(app, ["result", job.id])
    assert (told.exit_code, told.stderr) == (ExitCode.JOB_FAILED, "MEDIA_NOT_FOUND: No such file.\n")
    assert json.loads(keye.invoke(app, ["result", job.id, "--json"]).stdout)["media_index"] == 0


@pytest.mark.holds("docs/producers.md#while-it-runs", "From the shell, `keye watch`:")
def test_watch_shows_every_stage_and_the_end(keye: CliRunner, client: Client, redis: Redis) -> None:
    job = client.submit(JOB)
    start(redis, job)
    settle(redis, job, answer(job))
    watched = keye.invoke(app, ["watch", job.id])
    *steps, usage = watched.stdout.splitlines()
    assert [step.split("  ")[1] for step in steps] == ["fetch (attempt 1)", "SUCCEEDED"]
    assert usage.startswith("3 tokens in ")
    assert watched.exit_code == ExitCode.OK


@pytest.mark.holds("docs/producers.md#what-can-be-raised", "the URL or a `KEYE_*` setting cannot be used")
def test_wrong_settings_are_told_by_the_names_they_are_set_by(keye: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    odd_url = keye.invoke(app, ["submit", "?", "--redis-url", "localhost:6379"])
    assert odd_url.stderr.startswith(
        "KEYE_REDIS_URL: its scheme is none of redis, rediss, unix and sentinel. Write redis://"
    )
    monkeypatch.setenv("KEYE_LEASE_SECONDS", "0")
    monkeypatch.setenv("KEYE_UPLOAD_PREFIX", "hunter2")
    told = keye.invoke(app, ["submit", "?"])
    assert told.exit_code == ExitCode.INVALID
    assert told.stderr == (
        "KEYE_LEASE_SECONDS: Input should be greater than or equal to 1; "
        "KEYE_UPLOAD_PREFIX: String should match pattern '^s3://[^/]+(/.*)?$'\n"
    )


def test_what_is_wrong_with_a_worker_s_settings_is_nothing_to_a_producer(
    keye: CliRunner, redis_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".env").write_text("KEYE_DECODERS=many\nKEYE_DEVICE=hunter2\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KEYE_CONCURRENCY", "0")
    assert keye.invoke(app, ["submit", "?"]).exit_code == ExitCode.OK
    with Client(redis_url) as client:
        assert client.submit(prompt="?").state is JobState.QUEUED


def test_a_full_queue_is_told_from_an_absent_one(keye: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYE_MAX_QUEUE_DEPTH", "1")
    sent = [keye.invoke(app, ["submit", "?"]) for _ in range(2)]
    assert [each.exit_code for each in sent] == [ExitCode.OK, ExitCode.FULL]
    assert "the limit is 1 (KEYE_MAX_QUEUE_DEPTH). Try again in 30 s." in sent[1].stderr


@pytest.mark.holds("docs/producers.md#from-the-shell", "`keye --help` lists the exit codes")
def test_each_way_to_fail_has_its_own_exit_code(keye: CliRunner, client: Client, redis: Redis) -> None:
    queued, ended = client.submit(prompt="?", idempotency_key="k"), client.submit(JOB)
    settle(redis, ended, answer(ended))
    exits = {
        ("submit", ""): ExitCode.INVALID,
        ("submit", "?", "--job", "-"): ExitCode.INVALID,
        ("submit",): ExitCode.INVALID,
        ("submit", "!", "--idempotency-key", "k"): ExitCode.CONFLICT,
        ("result", queued.id, "--timeout", "0.1"): ExitCode.NOT_ENDED,
        ("result", "nobody"): ExitCode.NOT_FOUND,
        ("cancel", ended.id): ExitCode.TOO_LATE,
        ("cancel", queued.id): ExitCode.OK,
        ("watch", queued.id): ExitCode.JOB_FAILED,
        ("result", "x", "--redis-url", "redis://127.0.0.1:9/0"): ExitCode.UNAVAILABLE,
        ("result", "x", "--redis-url", "localhost"): ExitCode.INVALID,
    }
    assert {command: keye.invoke(app, list(command)).exit_code for command in exits} == exits
