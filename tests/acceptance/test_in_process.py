"""The analyzer and `keye-worker ask` as a script and a shell meet them: a worker's answers, and nothing left behind."""

import os
import pty
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keye import Analyzer, Client, JobResult, Thinking
from keye.producer.shell import ExitCode
from keye.worker.demo.local_worker import SMALL_KEYE, LocalWorker
from keye.worker.demo.scenes import draw_image_scene
from tests.acceptance.conftest import is_alive
from tests.support.checkout import PYTHONPATH
from tests.support.conditions import eventually
from tests.support.terminal import read_all
from tests.support.zoo import encode_clip

ASK = [sys.executable, "-m", "keye.worker.daemon.cli", "ask"]


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    draw_image_scene(np.random.default_rng(3), num_shapes=1).image.save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def environ(folder: Path, **settings: str) -> dict[str, str]:
    """Of a program that reads no settings of ours, with temporary files below `folder`."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith("KEYE_")}
    (folder / "temporary").mkdir(exist_ok=True)
    return mine | {"PYTHONPATH": PYTHONPATH, "TMPDIR": str(folder / "temporary"), "KEYE_DEVICE": "cpu", **settings}


@pytest.mark.holds(
    "docs/design.md#decisions",
    "runs its jobs by a worker's own attempts, engine and decoders",
    "So a script and a fleet share verbs, answers and errors.",
)
@pytest.mark.holds(
    "docs/from-a-script.md#what-becomes-of-my-transformers-script",
    "answers as a worker does, token by token",
)
def test_its_answers_are_a_workers_token_by_token(
    photo: Path, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = encode_clip(tmp_path / "clip.mp4", [number / 20 for number in range(60)])
    part = {"type": "video", "uri": str(clip), "fps": 4, "max_pixels": 84 * 84}
    drawn = {"temperature": 1.0, "top_p": 0.9, "seed": 7, "repetition_penalty": 1.1}
    chat = [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": [{"type": "image", "uri": str(photo)}, {"type": "text", "text": "What is it?"}]},
    ]
    jobs: list[dict[str, Any]] = [
        *({"prompt": "What do you see?", "media": str(photo), "thinking": mode} for mode in Thinking),
        {"prompt": "What do you see?", "media": str(photo), "generation": drawn},
        {"prompt": "图里有什么?", "media": [str(photo), part, str(photo)], "generation": {"max_new_tokens": 40}},
        {"prompt": "Which way does it move?", "media": [part], "generation": {**drawn, "stop": ["e"]}},
        {"messages": chat},
        {"prompt": "Say something."},
    ]
    monkeypatch.setenv("KEYE_DEVICE", "cpu")
    with Analyzer(SMALL_KEYE) as analyzer:
        ours = [analyzer.submit(**job) for job in jobs]
        answers = [job.result(timeout=60) for job in ours]
    settings = {"KEYE_MEDIA_ROOTS": str(tmp_path)}
    with LocalWorker(redis_url, tmp_path / "log", settings), Client(redis_url) as client:
        theirs = [client.submit(**job) for job in jobs]
        expected = [job.result(timeout=60) for job in theirs]
    own = {"job_id", "timings", "worker"}
    for answer, other in zip(answers, expected, strict=True):
        # Each draws a seed of its own where none was asked.
        drawn_seeds = {"generation": {"seed"}} if other.generation and other.generation.seed != 7 else {}
        # What is found in a cache depends on who came before.
        left_out = {**dict.fromkeys(own, True), **drawn_seeds, "usage": {"cached_tokens"}}
        assert answer.model_dump(exclude=left_out) == other.model_dump(exclude=left_out)  # type: ignore[arg-type]


# Whoever runs the tests in the background has children ignore it.
SCRIPT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from keye import Analyzer
analyzer = Analyzer(sys.argv[1])
print(analyzer.analyze("photo.png", "What do you see?").answer, flush=True)
sys.stdin.readline()
"""
ENDS = {
    "without a word": ("", 0),
    "by an error": ("raise SystemExit(3)", 3),
    "beside jobs": ("for _ in range(500): analyzer.submit(prompt='?')", 0),
    "by Ctrl-C": ("analyzer.batch(['photo.png'] * 100_000, '?')", -signal.SIGINT),
    "killed": ("analyzer.batch(['photo.png'] * 100_000, '?')", -signal.SIGKILL),
}


def children_of(pid: int) -> list[int]:
    """By what each says of its parent, for any thread's."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        # It may end meanwhile.
        with suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
    return found


@pytest.mark.parametrize("how", ENDS)
def test_a_script_that_ends_leaves_no_process(how: str, photo: Path, tmp_path: Path) -> None:
    last, expected = ENDS[how]
    command = [sys.executable, "-c", f"{SCRIPT}\n{last}", str(SMALL_KEYE)]
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(  # type: ignore[call-overload]
        command, cwd=tmp_path, env=environ(tmp_path), start_new_session=True, **streams
    ) as script:
        assert script.stdout.readline() == "A red circle.\n"
        decoders = children_of(script.pid)
        assert decoders
        script.stdin.write("\n")
        script.stdin.flush()
        if expected < 0:
            # As a terminal does it: to all of the group, decoders too, had they not one of their own.
            os.killpg(script.pid, -expected)
        _, said = script.communicate(timeout=60)
    assert script.returncode == expected
    assert said.count("Traceback") == (how == "by Ctrl-C"), said
    eventually(lambda: not any(map(is_alive, decoders)))
    left = [path.name for path in (tmp_path / "temporary").iterdir() if not path.name.startswith("keye-compiled-")]
    assert not left or how == "killed"


def ask(folder: Path, *words: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*ASK, *words], cwd=folder, env=environ(folder, **settings), capture_output=True, text=True, timeout=120
    )


def test_a_shell_asks_and_reads_the_answer_alone(photo: Path, tmp_path: Path) -> None:
    asked = ask(tmp_path, "photo.png", "What do you see?", "--thinking", "think")
    assert (asked.returncode, asked.stdout) == (0, "A red circle.\n")
    assert asked.stderr == "KEYE_MODEL_PATH is not set: a small model answers, which knows drawn shapes only.\n"
    asked = ask(tmp_path, "photo.png", "What do you see?", "--json", KEYE_MODEL_PATH=str(SMALL_KEYE))
    assert (asked.returncode, asked.stderr) == (0, "")
    assert JobResult.model_validate_json(asked.stdout).answer == "A red circle."


@pytest.mark.parametrize(
    ("words", "settings", "code", "said"),
    [
        (["photo.png"], {}, ExitCode.INVALID, "photo.png is a file. Give the question behind the media."),
        (["nowhere.png", "What?"], {}, ExitCode.INVALID, "there is no 'nowhere.png'"),
        (["/nowhere.png", "What?"], {}, ExitCode.JOB_FAILED, "MEDIA_NOT_FOUND: /nowhere.png"),
        (["What?"], {"KEYE_MODEL_PATH": "/nowhere"}, 12, "/nowhere is not a directory here."),
        (["What?"], {"KEYE_DEVICE": "tpu"}, 10, "KEYE_DEVICE"),
    ],
)
def test_what_a_shell_gets_wrong_ends_with_a_sentence_and_a_code(
    photo: Path, tmp_path: Path, words: list[str], settings: dict[str, str], code: int, said: str
) -> None:
    asked = ask(tmp_path, *words, **settings)
    assert (asked.returncode, asked.stdout) == (code, "")
    assert said in " ".join(asked.stderr.replace("│", " ").split())
    assert "Traceback" not in asked.stderr


@pytest.mark.holds(
    "docs/from-a-script.md#what-becomes-of-my-transformers-script",
    "shows the answer while it is written",
)
def test_a_terminal_shows_the_text_as_it_is_written(photo: Path, tmp_path: Path) -> None:
    leader, follower = pty.openpty()
    words = ["photo.png", "What do you see?", "--thinking", "think"]
    with subprocess.Popen([*ASK, *words], cwd=tmp_path, env=environ(tmp_path), stdout=follower) as asking:
        os.close(follower)
        shown = read_all(leader)
    assert asking.returncode == 0
    # In pieces, as they come: reasoning dim, the answer not.
    pieces = re.findall(r"(\x1b\[2m|\x1b\[22m)(.*?)\x1b\[0m", shown.decode(), re.DOTALL)
    written = {style: "".join(text for each, text in pieces if each == style) for style, _ in pieces}
    assert written["\x1b[2m"].startswith("red circle")
    assert written["\x1b[22m"] == "A red circle."


@pytest.mark.holds("docs/answers.md#answers-that-fit", "Both go with a job, with a batch, and with the worker's `ask`.")
def test_several_questions_are_answered_one_by_one(photo: Path, tmp_path: Path) -> None:
    words = ["photo.png", "What do you see?", "--also", "What colour is it?", "--thinking", "no_think"]
    asked = ask(tmp_path, *words)
    first, second = asked.stdout.splitlines()
    assert (asked.returncode, first) == (0, "question 1: A red circle.")
    assert second.startswith("question 2: ")
    leader, follower = pty.openpty()
    with subprocess.Popen([*ASK, *words], cwd=tmp_path, env=environ(tmp_path), stdout=follower) as asking:
        os.close(follower)
        shown = read_all(leader).decode()
    assert asking.returncode == 0
    # The first as it is written, and nothing of the other within it.
    assert re.sub(r"\x1b\[\d*m", "", shown).split() == ["A", "red", "circle.", *second.split()]
