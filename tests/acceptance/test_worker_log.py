"""What a worker and its supervisor write: every line, first to last, as an operator's collector gets it."""

import fcntl
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from redis import Redis

from keye.config.codes import ErrorCode
from keye.config.faults import JobFailed
from keye.config.job import GenerationOptions, ImagePart
from keye.producer import Client, Job
from keye.worker.daemon.exit_codes import ExitCode
from keye.worker.tasks.retry_policy import FIRST_PAUSE_SECONDS
from tests.acceptance.conftest import ECHO, PICTURE, Start, Started
from tests.support.checkout import PYTHONPATH
from tests.support.conditions import eventually
from tests.support.ports import free_port
from tests.support.redis_login import log_in

QUIET_ECHO = (ECHO[0], "--quiet", *ECHO[1:])
# Celery warns of root before it sets up any log; `keye-worker run` has it say nothing.
QUIETLY = {"PYTHONWARNINGS": "ignore"}
RUN = ("keye.worker.daemon.cli", "run")
TRACEPARENT = f"00-{'4b' * 16}-{'0f' * 8}-01"
SECRET = "Hush7Hush"
PROMPT = "What is this, between us?"


@contextmanager
def writing_to(out: int, command: tuple[str, ...], folder: Path, **settings: str) -> Iterator[subprocess.Popen[bytes]]:
    """A worker with that for its stdout and stderr, which this takes. Ends well when it is told to."""
    kept = {f"KEYE_{name}_FOLDER": str(folder / name.lower()) for name in ("RUN", "SPOOL")}
    environ = os.environ | {"PYTHONPATH": PYTHONPATH} | kept | settings
    worker = subprocess.Popen([sys.executable, "-m", *command], env=environ, stdout=out, stderr=out, cwd=folder)
    os.close(out)
    try:
        yield worker
        worker.terminate()
        assert worker.wait(30) == ExitCode.OK
    finally:
        worker.kill()
        worker.wait()


def records(worker: Started) -> list[dict[str, Any]]:
    """Raises where a line is none."""
    return [json.loads(line) for line in worker.log.splitlines()]


def moves(worker: Started, job: Job) -> list[tuple[Any, ...]]:
    """All that the log tells of the job, each with its trace."""
    told = [record for record in records(worker) if record.get("job_id") == job.id]
    assert {record["traceparent"] for record in told} <= {TRACEPARENT}
    return [tuple(each.get(name) for name in ("attempt", "state", "stage", "code")) for each in told if "state" in each]


@pytest.mark.holds(
    "docs/operations.md#what-does-the-log-say",
    "Supervisor and workers write to stderr, a record a line",
    "with `KEYE_LOG_FORMAT=json`, each record as an object",
    "`worker` is `supervisor`, `cpu`",
    "`state` is set in the record of each move",
    "is its way.",
    "have its `job_id`, `attempt`, `stage` and the `traceparent`",
    "No prompt, no answer and no query of a URL is logged.",
)
def test_json_tells_each_move_of_a_job_and_all_lines_are_json(start: Start, client: Client, tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(PICTURE)
    worker = start(*RUN, KEYE_LOG_FORMAT="json", KEYE_LOG_LEVEL="debug", KEYE_S3_ENDPOINT_URL="http://127.0.0.1:1")
    worker.wait_until_ready()
    brief = GenerationOptions(max_new_tokens=8)
    asked: dict[str, Any] = {"prompt": PROMPT, "generation": brief, "traceparent": TRACEPARENT}
    answered = client.submit(media=[str(tmp_path / "red.png")], **asked)
    answer = answered.result(timeout=60).raw_text
    retried = client.submit(media=[ImagePart(uri=f"s3://bucket/a.png?X-Amz-Signature={SECRET}")], **asked)
    eventually(lambda: (2, "RUNNING", None, None) in moves(worker, retried))
    retried.cancel()
    with pytest.raises(JobFailed):
        retried.result(timeout=60)
    worker.ask_to_end()
    assert worker.exit_code() == ExitCode.OK

    stages = [(1, "RUNNING", stage, None) for stage in ("fetch", "decode", "prepare", "generate")]
    assert moves(worker, answered) == [(1, "RUNNING", None, None), *stages, (1, "SUCCEEDED", None, None)]
    assert moves(worker, retried)[:3] == [
        (1, "RUNNING", None, None),
        (1, "RUNNING", "fetch", None),
        (1, "QUEUED", "fetch", ErrorCode.MEDIA_UNREACHABLE),
    ]
    failed = next(record for record in records(worker) if "due_at" in record)
    assert 0 < failed["due_at"] - datetime.fromisoformat(failed["time"]).timestamp() <= 2 * FIRST_PAUSE_SECONDS
    assert {record["worker"] for record in records(worker)} == {"supervisor", "cpu"}
    assert PROMPT not in worker.log
    assert answer not in worker.log
    assert SECRET not in worker.log


def test_a_job_that_kills_its_workers_is_told_of_by_who_takes_it_up(start: Start, client: Client) -> None:
    settings = {"KEYE_LOG_FORMAT": "json", "KEYE_LEASE_SECONDS": "1", **QUIETLY}
    dying = client.submit(prompt="die", max_attempts=1, traceparent=TRACEPARENT)
    start(*QUIET_ECHO, **settings).process.wait(60)
    heir = start(*QUIET_ECHO, **settings)
    with pytest.raises(JobFailed) as lost:
        dying.result(timeout=60)
    # The last stage that the dead worker came to tell of.
    stage = lost.value.failure.stage
    eventually(lambda: (1, "FAILED", stage, ErrorCode.WORKER_LOST) in moves(heir, dying))


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_wrong_password_of_redis_is_told_by_supervisor_and_worker_without_it(
    start: Start, redis_url: str, form: str
) -> None:
    url = log_in(redis_url, f"nobody:{SECRET}")
    settings = {"KEYE_REDIS_URL": url, "KEYE_LOG_FORMAT": form}
    supervisor, worker = start(*RUN, **settings), start(*QUIET_ECHO, **settings, **QUIETLY)
    assert supervisor.exit_code(60) == ExitCode.PREFLIGHT_FAILED
    eventually(lambda: "invalid username-password pair" in worker.log, within_seconds=60)
    for each in (supervisor, worker):
        assert "invalid username-password pair" in each.log
        assert SECRET not in each.log
        assert form == "text" or records(each)


@pytest.mark.holds("docs/alerts.md#keyeloglinesdropped", "jobs are answered as ever")
@pytest.mark.holds("docs/operations.md#what-does-the-log-say", "Nobody waits for who reads")
@pytest.mark.parametrize("reader", ["who is slow", "who is gone", "on a full disk"])
def test_jobs_are_answered_whoever_reads_the_log(
    reader: str, client: Client, redis: Redis, redis_url: str, tmp_path: Path
) -> None:
    if reader == "on a full disk":
        out = os.open("/dev/full", os.O_WRONLY)
    else:
        end, out = os.pipe()
        fcntl.fcntl(out, fcntl.F_SETPIPE_SZ, 4096)
        if reader == "who is gone":
            os.close(end)
    with writing_to(out, QUIET_ECHO, tmp_path, KEYE_REDIS_URL=redis_url):
        jobs = client.submit_many([{"prompt": f"say {number}"} for number in range(200)])
        assert {end.answer for _, end in client.results(jobs, timeout=120)} == {f"say {n}" for n in range(200)}


@pytest.mark.holds("docs/operations.md#what-does-the-log-say", "dropped and counted (`keye_log_lines_dropped_total`)")
def test_lines_that_nobody_took_are_counted(client: Client, redis_url: str, checkpoint: Path, tmp_path: Path) -> None:
    port = free_port()
    settings = {"KEYE_REDIS_URL": redis_url, "KEYE_MODEL_PATH": str(checkpoint), "KEYE_DEVICE": "cpu"}

    def is_counted() -> bool:
        told = urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
        return float(re.findall("^keye_log_lines_dropped_total (.+)$", told, re.MULTILINE)[0]) > 0

    full = os.open("/dev/full", os.O_WRONLY)
    with writing_to(full, RUN, tmp_path, KEYE_METRICS_PORT=str(port), **settings):
        assert client.submit(prompt="What is this?").result(timeout=150).answer
        eventually(is_counted)


def test_a_wrong_setting_of_the_log_stops_the_start_by_its_name(start: Start) -> None:
    worker = start(*RUN, KEYE_LOG_LEVEL="loud", KEYE_LOG_FORMAT="xml")
    assert worker.exit_code(60) == ExitCode.PREFLIGHT_FAILED
    assert "KEYE_LOG_FORMAT: " in worker.log
    assert "KEYE_LOG_LEVEL: " in worker.log
