"""What strangers write is read in a terminal, where nothing of it is obeyed: every command, every field, every way."""

import json
import os
import pty
import re
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from redis import Redis

from keye.config import keys
from keye.config.codes import ErrorCode, JobState, Stage
from keye.config.event import StageStarted, TextGenerated
from keye.config.outcome import JobFailure
from keye.config.presence import Presence
from keye.config.quarantine import entry_of
from keye.config.terminal import visible
from keye.producer import Client, ImagePart, Job
from tests.support.terminal import read_all
from tests.support.worker_side import answer, settle

# A title, a cleared screen, colours, hidden words; the same in one byte each; a bell, a line that is written over, a
# text turned round; and what rich would take for a style.
WORDS = (
    "\x1b]0;owned\x07\x1b[2J\x1b[31mFAKE\x1b[8m\x1b[0m\x9b2J\x9d0;owned\x9c\x07\x08\r\x7f\u202egnp.\u2066[bold red]x[/]"
)
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufffd]")
STYLE = re.compile("\x1b\\[[0-9;]*m")
# Of commands in one process, what each says.
MANY = """
import importlib, json, sys
module, marker, commands = sys.argv[1], sys.argv[2], json.load(open(sys.argv[3]))
app = importlib.import_module(module).app
for command in commands:
    print(marker, flush=True)
    try:
        app(command)
    except SystemExit:
        pass
"""
MARKER = "-- what the next one says --"


def through_a_pipe(command: list[str], environ: Mapping[str, str]) -> str:
    told = subprocess.run(
        command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=100, check=False
    )
    return told.stdout.decode()


def to_ascii_alone(command: list[str], environ: Mapping[str, str]) -> str:
    told = through_a_pipe(command, {**environ, "PYTHONIOENCODING": "ascii:strict"})
    assert told.isascii()
    return told


def to_a_terminal(command: list[str], environ: Mapping[str, str]) -> str:
    """Without our own styles, none of which strangers' words may bring along."""
    ours, theirs = pty.openpty()
    settings = termios.tcgetattr(theirs)
    settings[1] &= ~termios.OPOST
    termios.tcsetattr(theirs, termios.TCSANOW, settings)
    with subprocess.Popen(command, env=environ, stdout=theirs, stderr=theirs, stdin=subprocess.DEVNULL):
        os.close(theirs)
        text = read_all(ours).decode()
    assert "\x1b[31mFAKE" not in text
    assert "\x1b[8m" not in text
    return STYLE.sub("", text)


WAYS: dict[str, Callable[[list[str], Mapping[str, str]], str]] = {
    "a pipe": through_a_pipe,
    "a terminal": to_a_terminal,
    "ASCII alone": to_ascii_alone,
}


@pytest.fixture
def environ(redis_url: str, tmp_path: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("KEYE_", "FORCE_", "GITHUB_"))}
    own = {"KEYE_REDIS_URL": redis_url, "KEYE_RUN_FOLDER": str(tmp_path / "run"), "COLUMNS": "400", "TERM": "xterm"}
    return {**kept, **own, "KEYE_DEVICE": "cpu"}


@pytest.fixture
def told(redis: Redis, client: Client) -> tuple[Job, Job]:
    """One that has an answer and one that failed, in a Redis where each text that others may choose is hostile."""
    asked = {"prompt": WORDS, "media": [ImagePart(uri=f"/media/{WORDS}\n.png")], "metadata": {WORDS: WORDS}}
    good, bad = (client.submit(**asked, idempotency_key=f"{WORDS}{number}") for number in range(2))
    outcome = answer(good, f"two\n\tlines {WORDS}")
    worker = outcome.worker.model_copy(update={"host": WORDS + "\nhost", "device": WORDS})
    model = outcome.model.model_copy(update={"name": WORDS})
    events = [
        StageStarted(stage=Stage.FETCH, attempt=1, at=0).model_copy(update={"stage": Stage(WORDS)}),
        TextGenerated(channel="reasoning", text=WORDS, offset=0, num_tokens=1, attempt=1, at=0),
        TextGenerated(channel="answer", text=f"two\n\tlines {WORDS}", offset=0, num_tokens=1, attempt=1, at=0),
    ]
    for event in events:
        redis.xadd(keys.events(good.id), {"event": event.model_dump_json()})
    settle(redis, good, outcome.model_copy(update={"worker": worker, "model": model, "metadata": {WORDS: WORDS}}))
    failed = JobFailure(
        job_id=bad.id,
        code=ErrorCode.MEDIA_NOT_FOUND,
        message=f"{WORDS}\nkeye: all is well",
        stage=Stage.FETCH,
        retryable=False,
        attempts=1,
        media_index=0,
    )
    settle(redis, bad, failed)
    redis.hset(keys.record(bad.id), mapping={"worker": WORDS, "claimed_at": "1", "ended_at": "2"})
    redis.zadd(keys.DEAD_LETTERS, {bad.id: time.time()})
    present = Presence(worker=worker, state="ready", model=model, sickness=WORDS, warnings=(WORDS,))
    redis.set(keys.WORKERS.replace("*", "here"), present.model_dump_json(), ex=19)
    redis.xadd(keys.QUARANTINE, entry_of(WORDS.encode(), WORDS, WORDS, None), id="7-1")
    # A stranger's, by hand.
    redis.hset(keys.record(f"odd{WORDS}"), mapping={"state": WORDS, "outcome": WORDS})
    redis.zadd(keys.DEAD_LETTERS, {f"dead{WORDS}": time.time()})
    redis.hset(keys.record(f"dead{WORDS}"), mapping={"state": "FAILED", "outcome": WORDS, "sealed": WORDS})
    redis.xadd(keys.ENDED, {"job_id": WORDS, "state": JobState.FAILED.value})
    return good, bad


# Presence lasts for seconds, so the status comes first.
COMMANDS = {
    "status": "status",
    "status as JSON": "status --json",
    "top": "top --once",
    "top as JSON": "top --once --json",
    "status of a job": "status BAD",
    "status of a job as JSON": "status BAD --json",
    "list": "list",
    "list as JSON": "list --json",
    "result": "result GOOD",
    "result of a failure": "result BAD",
    "result as JSON": "result GOOD --json",
    "failure as JSON": "result BAD --json",
    "watch": "watch GOOD",
    "watch as JSON": "watch GOOD --json",
    "watch a failure": "watch BAD",
    "dead list": "dead list",
    "dead list as JSON": "dead list --json",
    "dead list messages": "dead list --messages",
    "dead show": "dead show BAD",
    "dead show as JSON": "dead show BAD --json",
    "dead show what cannot be read": "dead show dead+WORDS",
    "dead show a message": "dead show 7-1",
    "dead show a message as JSON": "dead show 7-1 --json",
    "dead requeue what cannot be": "dead requeue dead+WORDS",
    "dead purge": "dead purge dead+WORDS",
    "verify": "verify",
    "verify as JSON": "verify --json",
    "an id that nobody has": "result WORDS",
    "cancel what nobody has": "cancel WORDS",
    "a file that is not there": "submit ? WORDS",
    "an odd trace": "submit ? --traceparent WORDS",
    "a wrong period": "dead list --since WORDS",
    "a wrong code": "dead list --code WORDS",
    "a wrong option": "result --WORDS",
    "a wrong command": "WORDS",
    "too many arguments": "result one WORDS",
    "an option and what it hides": "result --WORDS=1",
    "a wrong argument of a command of commands": "dead WORDS",
    "a wrong number": "result one --timeout WORDS",
    "a file of jobs that is not there": "submit-many WORDS",
    "a job that is none": "submit --job FILE",
    "jobs that are none": "submit-many FILE",
    "a wrong server": "status --redis-url redis://WORDS",
}


@pytest.mark.holds("docs/producers.md#from-the-shell", "in a terminal nothing of it is obeyed")
@pytest.mark.parametrize("way", WAYS)
def test_nothing_that_others_wrote_is_obeyed_by_a_terminal(
    environ: dict[str, str], told: tuple[Job, Job], way: str, tmp_path: Path
) -> None:
    good, bad = told
    (tmp_path / "job").write_text(json.dumps({WORDS: WORDS, "prompt": WORDS, "media": [f"{WORDS}.png"]}))
    filled = {"FILE": str(tmp_path / "job"), "GOOD": good.id, "BAD": bad.id, "dead+WORDS": f"dead{WORDS}"}
    commands = {
        name: [filled.get(word, word.replace("WORDS", WORDS)) for word in line.split(" ")]
        for name, line in COMMANDS.items()
    }
    found = say_all("keye.producer.cli", commands, environ, way, tmp_path)
    assert {name: OBEYED.findall(text) for name, text in found.items() if OBEYED.search(text)} == {}
    assert [name for name, text in found.items() if "Traceback" in text] == []
    silent = {name for name, text in found.items() if "FAKE" not in text}
    assert silent <= {"an odd trace", "a wrong number", "a wrong server"}, silent
    # What breaks lines does so in an answer alone, and there it does.
    assert "two\n\tlines \\u001b]0;owned" in found["result"]
    assert "two\n\tlines \\u001b]0;owned" in found["watch"]
    for name in ("result of a failure", "dead list", "dead show"):
        assert not re.search("^keye: all is well", found[name], re.MULTILINE), name
    assert not re.search("^host", found["status"], re.MULTILINE)
    for name in ("result as JSON", "failure as JSON", "dead show as JSON", "dead show a message as JSON"):
        assert WORDS in texts_in(json.loads(found[name])), name
    assert json.loads(found["result as JSON"])["answer"] == f"two\n\tlines {WORDS}"
    assert json.loads(found["failure as JSON"])["message"].startswith(WORDS)


def say_all(
    module: str, commands: Mapping[str, list[str]], environ: Mapping[str, str], way: str, folder: Path
) -> dict[str, str]:
    (folder / "commands").write_text(json.dumps(list(commands.values())))
    command = [sys.executable, "-c", MANY, module, MARKER, str(folder / "commands")]
    _, *said = WAYS[way](command, environ).split(f"{MARKER}\n")
    return dict(zip(commands, said, strict=True))


def texts_in(value: object) -> str:
    match value:
        case str():
            return value
        case dict():
            return "".join(texts_in(key) + texts_in(inner) for key, inner in value.items())
        case list():
            return "".join(map(texts_in, value))
    return ""


@pytest.mark.parametrize("way", WAYS)
def test_the_worker_s_own_commands_say_it_just_so(
    environ: dict[str, str], told: tuple[Job, Job], tmp_path: Path, way: str
) -> None:
    folder = tmp_path / WORDS.replace("/", "")
    folder.mkdir()
    (folder / "x.png").write_bytes(b"no picture")
    hostile = {**environ, "KEYE_MODEL_PATH": str(folder), "KEYE_MEDIA_ROOTS": str(folder / "none")}
    commands = {
        "status": ["status"],
        "doctor": ["doctor"],
        "doctor as JSON": ["doctor", "--json"],
        "plan": ["plan", str(folder / "x.png")],
        "a wrong GPU": ["doctor", "--gpus", WORDS],
    }
    found = say_all("keye.worker.daemon.cli", commands, hostile, way, tmp_path)
    for name, command in {"run": ["run"], "probe": ["probe", f"--{WORDS}"]}.items():
        found[name] = WAYS[way]([sys.executable, "-m", "keye.worker.daemon.entry", *command], hostile)
    assert {name: OBEYED.findall(text) for name, text in found.items() if OBEYED.search(text)} == {}
    assert {name: text for name, text in found.items() if "FAKE" not in text} == {}


@pytest.mark.holds("docs/producers.md#from-the-shell", "`\\u001b` stands for an escape, in JSON too")
def test_what_is_visible_is_json_where_it_was_json() -> None:
    text = WORDS + "\ud800 é 漢字\u3000👩\u200d🔬 \u200f\n\tend"
    assert json.loads(visible(json.dumps(text, ensure_ascii=False))) == text
    assert visible("é 漢字\u3000👩\u200d🔬 \u200f\n\tend") == "é 漢字\u3000👩\u200d🔬 \u200f\n\tend"
