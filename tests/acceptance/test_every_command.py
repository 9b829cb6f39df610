"""Every command of `keye` and `keye-worker`, found by walking them: its help, without a server, with a wrong one, to a
pipe that is closed, to a full disk, and ended by a signal. One that is added is tried like the others.
"""

import io
import json
import os
import re
import signal
import socketserver
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import typer
from redis import Redis

from keye.producer import Client, cli
from keye.producer.shell import ExitCode
from keye.worker.daemon import cli as worker_cli
from keye.worker.daemon.exit_codes import ExitCode as WorkerExitCode
from tests.support.checkout import ROOT
from tests.support.conditions import eventually
from tests.support.forked_commands import Ended, forked
from tests.support.redis_login import log_in
from tests.support.worker_side import JOB, answer, settle

OBEYED = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f]")
CLOSED = "redis://127.0.0.1:9/0"
# A server that says nothing costs four of these.
TIMEOUTS = "?socket_timeout=1&socket_connect_timeout=1"
# Of commands that need more than what their help calls required.
WORDS = {
    "keye submit": "?",
    "keye submit-many": "JOBS",
    "keye cancel": "x",
    "keye batch run": "JOBS -o OUTPUT",
    "keye dead requeue": "--all",
    "keye dead purge": "--all --yes",
}
NEEDS_NO_REDIS = {"keye plan", "keye schema"}
NARROW = 60
CHECKPOINT = ROOT / "tests/golden/preview/checkpoint"
APPS = {"keye": cli.app, "keye-worker": worker_cli.app}


def walk(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    inner = getattr(command, "commands", None)
    if inner is None:
        yield name, command
    for each, below in (inner or {}).items():
        yield from walk(f"{name} {each}", below)


COMMANDS = dict(each for program, app in APPS.items() for each in walk(program, typer.main.get_command(app)))
OF_REDIS = [name for name in COMMANDS if name.startswith("keye ") and name not in NEEDS_NO_REDIS]
OF_REDIS += ["keye-worker status"]


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    unwanted = ("KEYE_", "FORCE_", "NO_COLOR", "COLUMNS", "GITHUB_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    (tmp_path / "jobs").write_text('{"prompt": "?"}\n')
    return {**kept, "TERM": "xterm", "KEYE_RUN_FOLDER": str(tmp_path / "run"), "KEYE_DEVICE": "cpu"}


def words_of(name: str, folder: Path) -> list[str]:
    """The command, with what it cannot go without."""
    required = " ".join("x" for param in COMMANDS[name].params if param.required)
    return (
        f"{name} {WORDS.get(name, required)}".replace("JOBS", str(folder / "jobs"))
        .replace("OUTPUT", str(folder / "answers"))
        .split()
    )


def ask_all(environ: dict[str, str], folder: Path, *options: str) -> dict[str, Ended]:
    """All commands that ask Redis, at once."""
    with forked([[*words_of(name, folder), *options] for name in OF_REDIS], environ, folder / "said") as commands:
        return dict(zip(OF_REDIS, commands.ended(), strict=True))


@pytest.fixture
def help_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], str]:
    """What a command or a program tells of itself to a terminal of so many columns."""

    def ask(name: str, columns: int) -> str:
        program, *command = name.split()
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr("sys.stdout", out := io.StringIO())
        with pytest.raises(SystemExit) as end:
            APPS[program]([*command, "--help"], prog_name=program)
        assert end.value.code == 0
        return out.getvalue()

    return ask


class TestHelp:
    # Its own is that of `keye-worker plan`.
    @pytest.mark.holds("docs/producers.md#from-the-shell", "Every command has `--json`.")
    @pytest.mark.parametrize("name", [name for name in COMMANDS if name != "keye plan"])
    def test_fits_in_60_columns_and_cuts_nothing(self, name: str, help_of: Callable[[str, int], str]) -> None:
        told = help_of(name, NARROW)
        assert "--json" in told
        assert max(map(len, told.splitlines())) <= NARROW
        assert "…" not in told
        assert told.rstrip().endswith(f"Exit codes: see {name.split()[0]} --help")

    @pytest.mark.parametrize("program", APPS)
    @pytest.mark.holds("docs/producers.md#from-the-shell", "`keye --help` lists the exit codes")
    def test_of_all_lists_the_exit_codes_once(self, program: str, help_of: Callable[[str, int], str]) -> None:
        told = " ".join(help_of(program, 200).split())
        codes = [*ExitCode] if program == "keye" else [*WorkerExitCode, *list(ExitCode)[-4:]]
        assert [code for code in codes if told.count(f" {code.value} {code.meaning}") != 1] == []
        assert max(map(len, help_of(program, NARROW).splitlines())) <= NARROW


@contextmanager
def listening(answer: bytes | None) -> Iterator[tuple[str, list[Any]]]:
    """The URL of a server that says this, or nothing, to whoever says something; and who has."""
    heard: list[Any] = []

    class Connection(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with suppress(ConnectionError):
                self.request.recv(4096)
                heard.append(self.client_address)
                if answer is not None:
                    self.request.sendall(answer)
                while answer is None and self.request.recv(4096):
                    pass

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads, block_on_close, request_queue_size = True, False, 64

    with Server(("127.0.0.1", 0), Connection) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield f"redis://127.0.0.1:{server.server_address[1]}/0", heard
        server.shutdown()
        thread.join()


@pytest.fixture(params=["none", "HTTP", "mute", "password"])
def wrong_url(request: pytest.FixtureRequest) -> Iterator[str]:
    match request.param:
        case "none":
            yield CLOSED
        case "HTTP":
            with listening(b"HTTP/1.1 400 Bad Request\r\n\r\n\x1b[2J") as (url, _):
                yield url
        case "mute":
            with listening(None) as (url, _):
                yield url + TIMEOUTS
        case "password":
            yield log_in(request.getfixturevalue("redis_url"), ":wrong")


@pytest.mark.holds("docs/producers.md#from-the-shell", "a Redis that cannot be used is one sentence")
@pytest.mark.holds("docs/producers.md#from-the-shell", "what is wrong is a sentence on standard error and an exit code")
def test_a_server_that_cannot_be_used_is_a_sentence_and_an_exit_code(
    wrong_url: str, environ: dict[str, str], tmp_path: Path
) -> None:
    options, refused = (["--json"], '{"line": 1, "job_id": null}\n') if wrong_url == CLOSED else ([], "\n")
    for name, ended in ask_all(environ | {"KEYE_REDIS_URL": wrong_url}, tmp_path, *options).items():
        is_worker = name.startswith("keye-worker")
        assert ended.code == (WorkerExitCode.PREFLIGHT_FAILED if is_worker else ExitCode.UNAVAILABLE), (name, ended)
        assert ended.seconds < 60, name
        assert ended.out == (refused if name == "keye submit-many" else ""), (name, ended)
        assert re.fullmatch(r".*Redis could not .*\. Check KEYE_REDIS_URL and that the server runs\.\n", ended.err), (
            name,
            ended,
        )
        assert not OBEYED.search(ended.err), (name, ended)


PRINTING = ["keye schema", "keye status", "keye status --json", "keye --version", "keye --help", "keye dead list -h"]
PRINTING += ["keye-worker --help", "keye-worker probe", "keye-worker probe --json", "keye-worker run --help"]


class TestOutput:
    """Nobody reads it, or it has no room."""

    @pytest.mark.holds("docs/producers.md#from-the-shell", "is ended quietly (141)")
    @pytest.mark.parametrize("stream", ["out", "err"])
    def test_that_nobody_reads_ends_a_command_without_a_word(
        self, stream: str, environ: dict[str, str], tmp_path: Path, redis_url: str
    ) -> None:
        reading, closed = os.pipe()
        os.close(reading)
        commands = [line.split() for line in PRINTING]
        if stream == "err":
            redis_url, commands = CLOSED, [words_of(name, tmp_path) for name in OF_REDIS]
        environ = environ | {"KEYE_REDIS_URL": redis_url}
        with forked(commands, environ, tmp_path / "said", **{stream: closed}) as started:
            os.close(closed)
            told = {" ".join(words): ended for words, ended in zip(commands, started.ended(), strict=True)}
        assert {name: ended for name, ended in told.items() if ended.code != ExitCode.UNREAD or ended.err} == {}

    @pytest.mark.holds("docs/producers.md#from-the-shell", "what cannot be written is told (74)")
    def test_that_has_no_room_is_told(self, environ: dict[str, str], tmp_path: Path, redis_url: str) -> None:
        commands = [line.split() for line in PRINTING]
        with forked(commands, environ | {"KEYE_REDIS_URL": redis_url}, tmp_path / "said", out="/dev/full") as started:
            told = [(ended.code, ended.err) for ended in started.ended()]
        said = "The output cannot be written: No space left on device. What was done is done; what it would say is lost"
        assert dict(zip(PRINTING, told, strict=True)) == dict.fromkeys(PRINTING, (ExitCode.UNWRITABLE, f"{said}.\n"))

    def test_that_nobody_reads_does_not_end_a_daemon(self, environ: dict[str, str]) -> None:
        """Who prints hears of it, a library as a rule."""
        code = (
            "from keye.config.terminal import *; guard_terminal(); outlive_output()\n"
            "try: print('said', flush=True)\nexcept BrokenPipeError: raise SystemExit(0)"
        )
        reader, writer = os.pipe()
        os.close(reader)
        command = [sys.executable, "-c", code]
        with open(writer, "wb") as unread:
            assert subprocess.run(command, stdout=unread, env=environ, check=False).returncode == 0

    def test_that_is_closed_is_no_fault(self, environ: dict[str, str]) -> None:
        command = f"{sys.executable} -m keye schema >&- 2>&- <&-"
        assert subprocess.run(command, shell=True, env=environ, check=False).returncode == 0


class TestInterrupted:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    @pytest.mark.holds("docs/producers.md#from-the-shell", "Ctrl-C (130) and SIGTERM (143) end each command at once")
    def test_while_it_asks(self, number: signal.Signals, environ: dict[str, str], tmp_path: Path) -> None:
        with listening(None) as (url, heard):
            # Each connects once.
            url += "?socket_timeout=100&socket_connect_timeout=100"
            commands = [words_of(name, tmp_path) for name in OF_REDIS]
            with forked(commands, environ | {"KEYE_REDIS_URL": url}, tmp_path / "said") as started:
                eventually(lambda: len(heard) >= len(commands), within_seconds=60)
                for pid in started.pids:
                    os.kill(pid, number)
                ended = dict(zip(OF_REDIS, started.ended(), strict=True))
        told = {name: (each.code, each.out) for name, each in ended.items()}
        # There is no other end to it.
        ends = {"keye top": ExitCode.OK} if number == signal.SIGINT else {}
        assert told == {name: (ends.get(name, 128 + number), "") for name in OF_REDIS}
        may_be_queued = r"Job \S+ may be queued: keye watch (\S+), keye result \1, keye cancel \1\n"
        going_on = "Job x goes on: keye watch x, keye result x, keye cancel x\n"
        for name, each in ended.items():
            expected = {
                "keye submit": may_be_queued,
                "keye submit-many": "Of lines 1 to 1 all, some or none are queued.\n",
                "keye result": going_on,
                "keye watch": going_on,
            }.get(name, "")
            assert re.fullmatch(expected, each.err), (name, each)

    @pytest.mark.holds("docs/producers.md#from-the-shell", "Whoever waits for a job is told how to go on")
    def test_while_it_waits_for_a_job(
        self, environ: dict[str, str], tmp_path: Path, redis: Redis, redis_url: str, client: Client
    ) -> None:
        waited_for, answered = client.submit(JOB), client.submit(JOB)
        settle(redis, answered, answer(answered))
        commands = [f"keye {line}".split() for line in (f"result {waited_for.id}", f"watch {waited_for.id} --json")]
        commands += [["keye", "submit", "?", "--wait"], ["keye", "replay", answered.id]]
        with forked(commands, environ | {"KEYE_REDIS_URL": redis_url}, tmp_path / "said") as started:
            eventually(lambda: redis.info("clients")["blocked_clients"] == len(commands), within_seconds=60)
            for pid in started.pids:
                os.kill(pid, signal.SIGINT)
            result, watch, submit, replay = started.ended()
        assert {each.code for each in (result, watch, submit, replay)} == {ExitCode.INTERRUPTED}
        assert {each.out for each in (result, watch, submit, replay)} == {""}
        going_on = "Job {0} goes on: keye watch {0}, keye result {0}, keye cancel {0}\n"
        assert [result.err, watch.err] == [going_on.format(waited_for.id)] * 2
        submitted, replayed = (re.search(r"Job (\S+) goes on", each.err)[1] for each in (submit, replay))  # type: ignore[index]
        assert submit.err == going_on.format(submitted)
        assert replay.err == f"{answered.id} -> {replayed}\n" + going_on.format(replayed)
        assert {client.find(job_id).state for job_id in (submitted, replayed)} == {"QUEUED"}

    @pytest.mark.parametrize("module", ["keye", "keye.worker.daemon.entry"])
    def test_while_its_modules_load(self, module: str, environ: dict[str, str]) -> None:
        command = [sys.executable, "-X", "importtime", "-m", module, "status"]
        with subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True) as loading:
            assert loading.stderr is not None
            # Told once it is loaded; what follows takes as long again.
            next(line for line in loading.stderr if line.rstrip().endswith(" pydantic"))
            loading.send_signal(signal.SIGINT)
            rest = [line for line in loading.stderr if not line.startswith("import time:")]
        assert (loading.returncode, rest) == (ExitCode.INTERRUPTED, [])

    @pytest.mark.holds("docs/operations.md#how-did-a-process-end", "The other commands of `keye-worker` end")
    @pytest.mark.parametrize(("command", "stream"), [("bench", "stderr"), ("doctor", "stdout")])
    def test_while_a_model_is_loaded_and_asked(
        self, command: str, stream: str, environ: dict[str, str], tmp_path: Path
    ) -> None:
        temporary = tmp_path / "temporary"
        temporary.mkdir()
        environ |= {"KEYE_MODEL_PATH": str(CHECKPOINT), "KEYE_CACHE_FOLDER": str(tmp_path), "TMPDIR": str(temporary)}
        line = [sys.executable, "-m", "keye.worker.daemon.entry", command]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(line, env=environ, text=True, **pipes) as running:  # type: ignore[call-overload]
            told = getattr(running, stream)
            next(said for said in told if said.startswith("2 of ") or "packages" in said)
            running.send_signal(signal.SIGINT)
            _, rest = running.communicate(timeout=30)
        assert running.returncode == ExitCode.INTERRUPTED
        assert "Traceback" not in rest
        assert "Exception ignored" not in rest


@pytest.mark.holds("docs/operations.md#how-did-a-process-end", "`keye-worker run --json` logs as JSON")
def test_a_worker_s_log_is_json_where_it_is_asked_for(environ: dict[str, str], tmp_path: Path) -> None:
    with forked([["keye-worker", "run", "--json"]], environ | {"KEYE_REDIS_URL": CLOSED}, tmp_path / "said") as started:
        (ended,) = started.ended()
    logged = [json.loads(line) for line in ended.err.splitlines()]
    assert (ended.code, logged[-1]["level"]) == (WorkerExitCode.PREFLIGHT_FAILED, "CRITICAL")
