"""The commands as people sit before them: in 60 columns, with styles or without, asked back, and told how it stands."""

import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping
from fcntl import ioctl
from pathlib import Path

import pytest
from PIL import Image
from redis import Redis
from typer.testing import CliRunner

from keye.config import keys
from keye.config.codes import ErrorCode, Stage
from keye.config.event import TextGenerated
from keye.config.outcome import JobFailure, WorkerIdentity
from keye.config.presence import Presence
from keye.producer import Client, Job, JobState
from keye.producer.cli import app
from keye.producer.shell import ExitCode
from tests.support.checkout import ROOT
from tests.support.terminal import read_all
from tests.support.worker_side import JOB, answer, settle

COLUMNS = 60
STYLE = re.compile("\x1b\\[[0-9;]*m")
CHECKPOINT = ROOT / "tests/golden/preview/checkpoint"
LONG = "Nothing can be read here: the folder that should hold it was moved, and nobody has been told where to."


@pytest.fixture
def environ(redis_url: str, tmp_path: Path) -> dict[str, str]:
    unwanted = ("KEYE_", "FORCE_", "PY_COLORS", "NO_COLOR", "COLUMNS", "GITHUB_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    own = {"KEYE_REDIS_URL": redis_url, "KEYE_RUN_FOLDER": str(tmp_path / "run"), "KEYE_DEVICE": "cpu"}
    return {**kept, **own, "TERM": "xterm", "KEYE_MODEL_PATH": str(CHECKPOINT)}


def at_a_terminal(line: str, environ: Mapping[str, str], typed: str = "") -> tuple[int, str]:
    """The exit code, and all that is seen."""
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    settings = termios.tcgetattr(theirs)
    settings[3] &= ~termios.ECHO
    termios.tcsetattr(theirs, termios.TCSANOW, settings)
    os.write(ours, typed.encode())
    program, *words = line.split()
    module = {"keye": "keye", "keye-worker": "keye.worker.daemon.entry"}[program]
    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    with subprocess.Popen([sys.executable, "-m", module, *words], env=environ, **streams) as command:  # type: ignore[call-overload]
        os.close(theirs)
        seen = read_all(ours)
    return command.returncode, seen.decode().replace("\r\n", "\n")


@pytest.fixture
def failed(redis: Redis, client: Client) -> Job:
    """One that failed for a long reason, in a Redis where a worker with much to say is there."""
    job = client.submit(prompt=LONG, media=["/media/a.png"])
    settle(
        redis,
        job,
        JobFailure(
            job_id=job.id,
            code=ErrorCode.MEDIA_NOT_FOUND,
            message=LONG,
            stage=Stage.FETCH,
            retryable=False,
            attempts=1,
            media_index=0,
        ),
    )
    redis.zadd(keys.DEAD_LETTERS, {job.id: time.time()})
    worker = WorkerIdentity(host="gpu-host-with-a-name", pid=4711, device="NVIDIA H100 80GB HBM3")
    redis.set(keys.worker("x", 1), Presence(worker=worker, state="ready", warnings=(LONG, LONG)).model_dump_json())
    return job


@pytest.mark.holds("docs/producers.md#from-the-shell", "In a terminal lines are broken between words")
@pytest.mark.parametrize(
    "line",
    [
        "keye status",
        "keye status JOB",
        "keye list",
        "keye top --once",
        "keye dead list",
        "keye dead show JOB",
        "keye result JOB",
        "keye result nobody",
        "keye verify",
        "keye-worker status",
        "keye-worker plan PICTURE",
        "keye-worker plan PICTURE --gpu-memory 1GiB --precision float32",
    ],
)
def test_no_line_is_longer_than_the_terminal(line: str, environ: dict[str, str], failed: Job, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    Image.new("RGB", (640, 480)).save(picture)
    _, seen = at_a_terminal(line.replace("JOB", failed.id).replace("PICTURE", str(picture)), environ)
    lines = STYLE.sub("", seen).splitlines()
    assert lines
    # What has no space, an id say, stays whole.
    assert [each for each in lines if len(each) > COLUMNS and " " in each.strip()] == []
    assert ("…" in seen, "Traceback" in seen) == (line == "keye list", False)


class TestStyles:
    @pytest.fixture
    def watch(self, redis: Redis, client: Client) -> str:
        job = client.submit(JOB)
        thought = TextGenerated(channel="reasoning", text="so", offset=0, num_tokens=1, attempt=1, at=0)
        redis.xadd(keys.events(job.id), {"event": thought.model_dump_json()})
        settle(redis, job, answer(job))
        return f"keye watch {job.id}"

    @pytest.mark.parametrize("line", ["WATCH", "keye --help", "keye nonsense", "keye-worker doctor --gpus 77"])
    @pytest.mark.holds("docs/producers.md#from-the-shell", "no styles where `NO_COLOR` is set")
    def test_are_where_somebody_wants_them(self, line: str, watch: str, environ: dict[str, str]) -> None:
        line = line.replace("WATCH", watch)
        plain = [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {"NO_COLOR": "1", "FORCE_COLOR": "1"}]
        seen = [at_a_terminal(line, environ | asked)[1] for asked in ({}, *plain)]
        assert [bool(STYLE.search(each)) for each in seen] == [True, False, False, False]
        assert {each.count("\\u001b") for each in seen} == {0}

    def test_in_a_pipe_are_asked_for(self, watch: str, environ: dict[str, str]) -> None:
        command = [sys.executable, "-m", *watch.split()]
        said = [
            subprocess.run(command, env=environ | asked, capture_output=True, text=True, check=True).stdout
            for asked in ({}, {"FORCE_COLOR": "1"})
        ]
        assert [bool(STYLE.search(each)) for each in said] == [False, True]


class TestPurge:
    """Of jobs or messages that are not named one by one."""

    @pytest.mark.holds(
        "docs/operations.md#which-jobs-failed-for-good-and-how-do-i-send-them-again", "`purge` by a filter asks"
    )
    @pytest.mark.parametrize("choice", ["--all", "--code MEDIA_NOT_FOUND", "--since 1h"])
    def test_asks_at_a_terminal(self, choice: str, environ: dict[str, str], failed: Job, client: Client) -> None:
        code, seen = at_a_terminal(f"keye dead purge {choice}", environ, typed="n\n")
        assert (code, seen) == (ExitCode.OK, "Forget 1 dead letter for good? [y/N] None was forgotten.\n")
        assert [each.job_id for each in client.dead_letters.select()] == [failed.id]
        code, seen = at_a_terminal(f"keye dead purge {choice}", environ, typed="y\n")
        assert (code, seen) == (ExitCode.OK, f"Forget 1 dead letter for good? [y/N] {failed.id}\n")
        assert list(client.dead_letters.select()) == []

    def test_is_told_to_be_sure_elsewhere(self, redis_url: str, failed: Job, client: Client) -> None:
        keye = CliRunner(env={"KEYE_REDIS_URL": redis_url})
        told = keye.invoke(app, ["dead", "purge", "--all"])
        assert (told.exit_code, told.stdout) == (ExitCode.INVALID, "")
        assert told.stderr.startswith("Forget 1 dead letter for good? ")
        assert "--yes" in told.stderr
        told = keye.invoke(app, ["dead", "purge", "--all", "--yes", "--json"])
        assert (told.exit_code, json.loads(told.stdout)) == (ExitCode.OK, {"job_id": failed.id})
        assert keye.invoke(app, ["dead", "purge", "--all"]).exit_code == ExitCode.OK  # there are none

    @pytest.mark.holds(
        "docs/operations.md#which-jobs-failed-for-good-and-how-do-i-send-them-again", "By ids it does not ask."
    )
    def test_by_ids_does_not_ask(self, redis_url: str, failed: Job) -> None:
        told = CliRunner(env={"KEYE_REDIS_URL": redis_url}).invoke(app, ["dead", "purge", failed.id])
        assert (told.exit_code, told.stdout) == (ExitCode.OK, f"{failed.id}\n")


class TestWatch:
    @pytest.mark.holds("docs/producers.md#while-it-runs", "says where a queued job stands")
    def test_says_where_a_queued_job_stands_whenever_it_has_moved(
        self, environ: dict[str, str], redis: Redis, client: Client
    ) -> None:
        first, job = client.submit(JOB), client.submit(JOB)
        command = [sys.executable, "-m", "keye", "watch", job.id]
        with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True) as watching:
            assert watching.stdout is not None
            told = (line.split("  ", 1)[-1] for line in watching.stdout)
            assert next(told) == "queued, 1 before it; no worker is ready\n"
            first.cancel()
            assert next(told) == "queued, 0 before it; no worker is ready\n"
            settle(redis, job, answer(job))
            assert list(told)[-2] == "SUCCEEDED\n"

    @pytest.mark.holds("docs/producers.md#while-it-runs", "and what of its text it has not seen")
    @pytest.mark.holds("docs/producers.md#while-it-runs", "With `--json` it prints the events, one a line")
    def test_says_where_the_text_is_that_it_could_not_show(self, redis_url: str, redis: Redis, client: Client) -> None:
        job = client.submit(JOB)
        late = TextGenerated(channel="answer", text="square", offset=6, num_tokens=3, attempt=1, at=0)
        redis.xadd(keys.events(job.id), {"event": late.model_dump_json()})
        settle(redis, job, answer(job))
        keye = CliRunner(env={"KEYE_REDIS_URL": redis_url})
        *_, told, _ = keye.invoke(app, ["watch", job.id]).stdout.splitlines()
        assert told == f"Text is missing above; all of it: keye result {job.id} --json"
        events = keye.invoke(app, ["watch", job.id, "--json"]).stdout.splitlines()
        assert {json.loads(each)["type"] for each in events} == {"text", "ended"}


class TestPrompt:
    @pytest.fixture
    def keye(self, redis_url: str) -> CliRunner:
        return CliRunner(env={"KEYE_REDIS_URL": redis_url})

    @pytest.mark.holds("docs/producers.md#from-the-shell", "`-` for the prompt reads it from standard input")
    @pytest.mark.parametrize(
        ("said", "asked"),
        [
            (b"What is it?\n", "What is it?"),
            (b"two\nlines\r\n", "two\nlines"),
            (b"\xef\xbb\xbf\xe9\xad\x9a\n\n", "\N{CJK UNIFIED IDEOGRAPH-9B5A}\n"),
            (b"a" * 2**20 + b"\r\n", "a" * 2**20),
        ],
    )
    def test_comes_from_standard_input(self, said: bytes, asked: str, keye: CliRunner, redis: Redis) -> None:
        told = keye.invoke(app, ["submit", "-"], input=said)
        sealed = redis.hget(keys.record(told.stdout.strip()), "sealed")
        assert json.loads(sealed)["job"]["prompt"] == asked  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("said", "why"),
        [
            (b"", "standard input is empty"),
            (b"\n", "standard input is empty"),
            (b"caf\xe9\n", "standard input is no UTF-8 from byte 4 on"),
            (b"a" * (2**20 + 1), "1048577 bytes of text, the limit is 1048576"),
            (b"a" * (2**20 + 9), "standard input has more than 1048576 bytes"),
        ],
    )
    def test_that_is_none_is_refused(self, said: bytes, why: str, keye: CliRunner) -> None:
        told = keye.invoke(app, ["submit", "-"], input=said)
        assert (told.exit_code, told.stderr.count("\n"), why in told.stderr) == (ExitCode.INVALID, 1, True)

    def test_is_asked_for_at_a_terminal(self, environ: dict[str, str], client: Client) -> None:
        code, seen = at_a_terminal("keye submit -", environ, typed="What is it?\n\x04")
        hint, job_id = seen.splitlines()
        assert (code, hint) == (ExitCode.OK, "Reading the prompt until Ctrl-D.")
        assert client.find(job_id).state is JobState.QUEUED

    @pytest.mark.holds("docs/producers.md#from-python", "blank lines are no jobs")
    def test_s_blank_lines_in_a_manifest_are_nothing(self, keye: CliRunner, client: Client, tmp_path: Path) -> None:
        lines = b'\xef\xbb\xbf\r\n{"prompt": "?"}\r\n \t\r\nno JSON\r\n\n{"prompt": "!"}\n\n'
        sent = keye.invoke(app, ["submit-many", "-", "--json"], input=lines)
        told = [json.loads(line) for line in sent.stdout.splitlines()]
        assert [each["line"] for each in told] == [2, 4, 6]
        assert [each["job_id"] is None for each in told] == [False, True, False]
        assert sent.stderr.startswith("line 4: 1 fault: ")
        (tmp_path / "blank").write_bytes(b"\xef\xbb\xbf\r\n\n  \n")
        blank = keye.invoke(app, ["submit-many", str(tmp_path / "blank")])
        assert (blank.exit_code, blank.output) == (ExitCode.OK, "")
