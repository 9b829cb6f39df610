"""`keye batch run` as people sit before it, and as a script or a service has it: what it shows, says and ends with."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from redis import Redis
from typer.testing import CliRunner, Result

from keye.producer.cli import app
from keye.producer.shell import ExitCode
from tests.chaos.echo_workers import EchoWorkers
from tests.integration.batch.conftest import Answering
from tests.support.conditions import eventually
from tests.support.terminal import KEYE, Terminal, wait_until_shown

FAST = r"41 of 44 lines, 1 failed, 3 in flight, [\d.]+ lines/s, done in about 0:0"
DRAWN = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture
def environ(redis_url: str) -> dict[str, str]:
    unwanted = ("KEYE_", "FORCE_", "NO_COLOR", "COLUMNS", "GITHUB_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    return {**kept, "KEYE_REDIS_URL": redis_url}


@pytest.fixture
def workers(redis: Redis, redis_url: str, tmp_path: Path) -> Iterator[EchoWorkers]:
    folder = tmp_path / "workers"
    folder.mkdir()
    workers = EchoWorkers(redis_url, redis, folder, lease_seconds=30)
    yield workers
    workers.end()


@pytest.fixture
def let_go(tmp_path: Path) -> Path:
    """Once it is there, jobs end that wait for it."""
    return tmp_path / "let_go"


@pytest.fixture
def questions(tmp_path: Path, let_go: Path) -> Path:
    """Of 44 lines 40 are answered at once, one is no job, and three wait."""
    prompts = [{"prompt": f"question {number}"} for number in range(40)] + [{"promt": "?"}]
    lines = [*prompts, *[{"prompt": f"write {let_go}"}] * 3]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    return tmp_path / "answers.jsonl"


def in_process(redis_url: str, *words: str | Path, **environ: str) -> Result:
    runner = CliRunner(env={"KEYE_REDIS_URL": redis_url, **environ})
    return runner.invoke(app, ["batch", "run", *map(str, words)])


def custom_ids(*paths: Path) -> list[str]:
    return sorted(json.loads(line)["custom_id"] for path in paths for line in path.read_text().splitlines())


class TestTerminal:
    @pytest.mark.holds(
        "docs/batches.md#how-do-i-ask-about-a-whole-bucket-or-a-file-of-a-million-questions",
        "At a terminal a bar tells how many have ended and failed",
    )
    @pytest.mark.parametrize("columns", [60, 200])
    def test_shows_how_far_and_how_fast_and_is_left_as_it_was(
        self, columns: int, environ: dict[str, str], workers: EchoWorkers, questions: Path, answers: Path, let_go: Path
    ) -> None:
        workers.start_ready()
        command = [*KEYE, "batch", "run", str(questions), "-o", answers.name]
        with Terminal(["env", "-C", str(answers.parent), *command], environ, columns) as terminal:
            # Broken between words, where it has to be.
            eventually(lambda: re.search(FAST, " ".join(DRAWN.sub("", terminal.said).split())))
            assert max(map(len, terminal.screen)) < columns
            assert any(len(line) == columns - 2 and set(line) <= set("━╸╺") for line in terminal.screen)
            let_go.touch()
            assert terminal.ended() == ExitCode.JOB_FAILED
            assert terminal.is_as_before()
            (told,) = eventually(lambda: re.findall(r"(?s).*\x1b\[\?25h(.* again\).*)", terminal.said))
        # Each row of what was drawn is gone.
        assert told.count("\x1b[2K") == (3 if columns == 60 else 2), told
        assert DRAWN.sub("", told).split() == [
            "44",
            "lines:",
            "43",
            "answered",
            "(answers.jsonl),",
            "1",
            "failed",
            "(answers.errors.jsonl;",
            "--retry-failed",
            "runs",
            "them",
            "again)",
        ]

    def test_says_that_nobody_answers_and_goes_on_after_ctrl_c(
        self, environ: dict[str, str], workers: EchoWorkers, questions: Path, answers: Path, let_go: Path
    ) -> None:
        command = [*KEYE, "batch", "run", str(questions), "-o", str(answers)]
        with Terminal(command, environ) as terminal:
            wait_until_shown(terminal, "no worker is ready")
            terminal.type("\x03")
            assert terminal.ended() == ExitCode.INTERRUPTED
            assert terminal.is_as_before()
            (told,) = eventually(lambda: re.findall(r"(?s).*\x1b\[\?25h(.* here\.)", terminal.said))
        assert " ".join(DRAWN.sub("", told).split()) == (
            "1 of 44 lines, 1 failed, 43 in flight; no worker is ready. What is in flight is answered all the same. "
            "The same command goes on from here."
        )
        workers.start_ready()
        let_go.touch()
        ended = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
        assert ended.returncode == ExitCode.JOB_FAILED, ended
        errors = answers.with_suffix(".errors.jsonl")
        assert custom_ids(answers, errors) == sorted(f"line-{number}" for number in range(1, 45))


class TestElsewhere:
    def test_a_log_says_what_it_waits_for_and_a_service_is_stopped(
        self, environ: dict[str, str], questions: Path, answers: Path
    ) -> None:
        command = [*KEYE, "batch", "run", str(questions), "-o", str(answers)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        environ |= {"KEYE_MAX_QUEUE_DEPTH": "2"}
        with subprocess.Popen(command, env=environ, text=True, **pipes) as running:  # type: ignore[call-overload]
            line = running.stderr.readline()
            running.terminate()
            out, rest = running.communicate(timeout=30)
        assert (running.returncode, out) == (ExitCode.TERMINATED, "")
        assert re.fullmatch(
            r"1 of (about )?44 lines, 1 failed, 2 in flight(, [\d.]+ lines/s)?; "
            r"2 jobs are queued, the limit is 2 .* s; no worker is ready\n",
            line,
        ), line
        assert rest.endswith("The same command goes on from here.\n")

    def test_json_is_alone_on_standard_output(
        self, redis_url: str, workers: EchoWorkers, questions: Path, answers: Path, let_go: Path
    ) -> None:
        workers.start_ready()
        let_go.touch()
        ended = in_process(redis_url, questions, "-o", answers, "--json")
        assert (ended.exit_code, ended.stderr) == (ExitCode.JOB_FAILED, "")
        assert json.loads(ended.stdout) == {
            "request_counts": {"total": 44, "completed": 43, "failed": 1},
            "output_file": str(answers),
            "error_file": str(answers.with_suffix(".errors.jsonl")),
        }

    def test_files_that_are_no_media_are_passed_over_aloud(
        self, redis_url: str, workers: EchoWorkers, tmp_path: Path, answers: Path
    ) -> None:
        photos = tmp_path / "photos"
        photos.mkdir()
        Image.new("RGB", (84, 84)).save(photos / "b.png")
        for name in ("a.txt", "c.pdf", ".hidden.png"):
            (photos / name).write_text("?")
        workers.start_ready(KEYE_MEDIA_ROOTS=str(photos))
        ended = in_process(redis_url, photos, "What is it?", "-o", answers)
        assert (ended.exit_code, ended.stdout) == (ExitCode.OK, f"1 line: 1 answered ({answers}), 0 failed\n")
        assert ended.stderr == "2 files passed over, by name neither image nor video\n"
        ended = in_process(redis_url, photos, "What is it?", "-o", answers, "--json")
        assert json.loads(ended.stdout)["request_counts"] == {"total": 1, "completed": 1, "failed": 0}
        assert ended.stderr.endswith("\nAll had ended before: nothing was asked\n")
        # Its question has been asked.
        assert in_process(redis_url, photos, "Why?", "-o", answers).exit_code == ExitCode.INVALID

    def test_nothing_to_ask_is_no_success_and_keeps_no_output_from_others(
        self, redis_url: str, workers: EchoWorkers, tmp_path: Path, answers: Path
    ) -> None:
        (tmp_path / "none.jsonl").write_text("\n\n")
        (tmp_path / "some.jsonl").write_text('{"prompt": "?"}\n')
        (tmp_path / "notes").mkdir()
        (tmp_path / "notes" / "a.txt").write_text("?")
        for source, *question in (["none.jsonl"], ["notes", "What is it?"], ["notes", "Why?"]):
            ended = in_process(redis_url, tmp_path / source, *question, "-o", answers)
            assert ended.exit_code == ExitCode.INVALID
            assert ended.stderr.endswith(f"{tmp_path / source} holds nothing that could be asked\n")
        workers.start_ready()
        assert in_process(redis_url, tmp_path / "some.jsonl", "-o", answers).exit_code == ExitCode.OK

    def test_a_server_that_takes_nothing_for_too_long_ends_it(
        self, redis: Redis, environ: dict[str, str], questions: Path, answers: Path
    ) -> None:
        code = "import keye.producer.batch.batch as batch; batch.OUTAGE_SECONDS = 1\n"
        command = [sys.executable, "-P", "-c", f"{code}{KEYE[-1]}", "batch", "run", str(questions), "-o", str(answers)]
        redis.config_set("maxmemory", 1)
        try:
            ended = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
        finally:
            redis.config_set("maxmemory", 0)
        assert (ended.returncode, ended.stdout) == (ExitCode.UNAVAILABLE, "")
        assert re.fullmatch(
            r"(?s).*Redis could not queue the job .* It is full: give it more memory, .*\n", ended.stderr
        )


class TestDisk:
    def test_that_is_full_ends_it_and_with_room_it_goes_on(
        self, environ: dict[str, str], workers: EchoWorkers, tmp_path: Path, answers: Path
    ) -> None:
        questions = tmp_path / "questions.jsonl"
        questions.write_text("".join(f'{{"prompt": "question {number}"}}\n' for number in range(300)))
        workers.start_ready()
        command = [*KEYE, "batch", "run", str(questions), "-o", str(answers)]
        limited = ["bash", "-c", 'ulimit -f 100; exec "$@"', "-", *command]
        ended = subprocess.run(limited, env=environ, capture_output=True, text=True, check=False)
        assert (ended.returncode, ended.stdout) == (ExitCode.UNWRITABLE, "")
        assert re.fullmatch(rf"{answers}(\.journal)? cannot be written: .*\n", ended.stderr)
        ended = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
        assert (ended.returncode, ended.stdout) == (ExitCode.OK, f"300 lines: 300 answered ({answers}), 0 failed\n")
        assert custom_ids(answers) == sorted(f"line-{number}" for number in range(1, 301))

    @pytest.mark.parametrize(
        "names", [("nowhere/answers.jsonl", "errors.jsonl"), ("answers.jsonl", "nowhere/errors.jsonl")]
    )
    def test_that_has_no_such_folder(self, redis_url: str, questions: Path, names: tuple[str, str]) -> None:
        answers, errors = (questions.parent / name for name in names)
        ended = in_process(redis_url, questions, "-o", answers, "--errors", errors)
        assert (ended.exit_code, ended.stdout) == (ExitCode.UNWRITABLE, "")
        assert re.fullmatch(
            r".*nowhere/.*\.jsonl cannot be written: there is no folder .*nowhere that may .*\n", ended.stderr
        )
        assert not answers.with_name("answers.jsonl.journal").exists()


def test_the_question_for_all_may_be_piped(redis_url: str, answering: Answering, tmp_path: Path, answers: Path) -> None:
    (tmp_path / "media.csv").write_text("media\ns3://photos/1.jpg\n")
    keye = CliRunner(env={"KEYE_REDIS_URL": redis_url})
    command = ["batch", "run", str(tmp_path / "media.csv"), "-", "-o", str(answers)]
    ended = keye.invoke(app, command, input="What is shown,\nand where?\n")
    assert ended.exit_code == ExitCode.OK, ended.stderr
    assert json.loads(answers.read_text())["answer"] == "What is shown,\nand where?"


@pytest.mark.parametrize("option", ["--output", "--errors"])
def test_a_name_that_no_file_can_have_is_a_sentence(
    redis_url: str, questions: Path, answers: Path, option: str
) -> None:
    ended = in_process(redis_url, questions, "-o", answers, option, questions.parent / ("x" * 260))
    assert (ended.exit_code, ended.stdout) == (ExitCode.UNWRITABLE, "")
    assert re.fullmatch(r".*/x+(\.journal)? cannot be written: .*\n", ended.stderr)


@pytest.mark.holds(
    "docs/batches.md#what-can-the-input-be",
    "What is no input at all (no such file",
)
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nothing.jsonl", "-o", "answers"], "nothing.jsonl cannot be read: No such file"),
        (["photos", "-o", "answers"], "photos holds no questions"),
        (["photos", "", "-o", "answers"], "prompt"),
        (["photos", "?"], "--output"),
        (["photos/a.png", "?", "-o", "answers"], "photos/a.png is a medium itself"),
        (["table.csv", "-o", "answers"], "table.csv has no column prompt, but id, image, question"),
        (["S3://bucket", "-o", "answers"], "S3://bucket holds no questions"),
        (["table.xlsx", "?", "-o", "answers"], "table.xlsx looks like "),
        (["list.json", "-o", "answers"], "list.json is JSON, but not a job in each line"),
        (["jobs.jsonl", "-o", "photos"], "photos is no file"),
        (["jobs.jsonl", "-o", "pipe"], "pipe is no file"),
        (["jobs.jsonl", "-o", "answers", "--errors", "/dev/null"], "/dev/null is no file"),
        (["jobs.jsonl", "-o", "photos/../jobs.jsonl"], "jobs.jsonl is given twice"),
        (["jobs.jsonl", "-o", "answers", "--errors", "./answers"], "answers is given twice"),
        (["jobs.jsonl", "-o", "answers", "--report", "answers"], "answers is given twice"),
        (["jobs.jsonl", "-o", ""], "names no file"),
        (["jobs.jsonl", "-o", "loop"], "loop is no file"),
        (["jobs.jsonl", "-o", "-"], "not standard input"),
        (["-", "-o", "answers"], "not standard input"),
        (["jobs.jsonl", "-o", "answers", "--max-new-tokens", "0"], "generation.max_new_tokens"),
    ],
)
def test_what_is_no_batch_is_a_sentence_and_leaves_nothing(
    words: list[str], told: str, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (84, 84)).save("photos/a.png")
    (tmp_path / "table.xlsx").write_bytes(b"PK\x03\x04\0\0")
    (tmp_path / "table.csv").write_text("id,image,question\n7,a.png,?\n")
    (tmp_path / "list.json").write_text('[\n  {"prompt": "?"}\n]\n')
    (tmp_path / "jobs.jsonl").write_text('{"prompt": "?"}\n')
    os.mkfifo("pipe")
    os.symlink("loop", "loop")
    before = sorted(tmp_path.rglob("*"))
    ended = in_process(redis_url, *words, COLUMNS="200")
    assert (ended.exit_code, ended.stdout) == (ExitCode.INVALID, "")
    assert told in ended.stderr
    assert sorted(tmp_path.rglob("*")) == before
