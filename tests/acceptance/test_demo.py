"""The first thing a new user runs."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from keye.config.job import AnalysisJob
from keye.producer import Client, Job
from keye.worker.demo import demonstration, local_worker
from keye.worker.demo.demonstration import Board
from keye.worker.demo.errands import Errand
from keye.worker.demo.local_worker import LocalWorker
from tests.acceptance.slow_echo import LOAD_SECONDS
from tests.support.checkout import PYTHONPATH


@pytest.mark.holds("docs/test-without-a-gpu.md#and-with-a-real-worker", "`keye-worker demo` answers without a GPU")
@pytest.mark.holds("README.md#see-it-work", "make demo # sets up .venv", "`demo.png` shows them")
@pytest.mark.holds("docs/design.md#decisions", "Without a server or a GPU, `make demo` starts an embedded Valkey")
def test_demo_answers_every_job_as_expected_and_saves_a_picture(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "keye.worker.daemon.cli", "demo", "--json"]
    demo = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert demo.returncode == 0, demo.stdout + demo.stderr
    assert "9 of 9 ended as expected" in demo.stderr
    jobs = [json.loads(line) for line in demo.stdout.splitlines()]
    assert [job["is_right"] for job in jobs] == [True] * 9
    assert {job["outcome"]["kind"] for job in jobs} == {"result", "failure"}
    with Image.open(tmp_path / "demo.png") as picture:
        assert picture.width > 800


@pytest.mark.parametrize(("columns", "has_times"), [(60, False), (100, True)])
def test_what_a_terminal_has_no_room_for_is_left_out(columns: int, has_times: bool) -> None:
    errand = Errand("changing.webm", AnalysisJob(prompt="Which colour does it become?"), "Yellow.", None)
    console = Console(file=io.StringIO(), width=columns)
    console.print(Board([errand], [Job("7", None)]))  # type: ignore[arg-type]
    told = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in told
    assert ("changing.webm" in told, "fetch" in told) == (True, has_times)


def test_the_demo_waits_as_long_as_its_worker_gets_on(
    monkeypatch: pytest.MonkeyPatch, redis_url: str, client: Client, tmp_path: Path
) -> None:
    monkeypatch.setattr(demonstration, "QUIET_SECONDS", 6.0)
    settings = {"CELERY_WORKER_INCLUDE": "tests.acceptance.echo_engine", "PYTHONPATH": PYTHONPATH}
    prompts = [*(["wait 2"] * 5), "wait 600"]
    errands = [Errand(prompt, AnalysisJob(prompt=prompt), prompt, None) for prompt in prompts]
    with LocalWorker(redis_url, tmp_path / "log", settings | {"KEYE_CONCURRENCY": "1"}):
        jobs = [client.submit(errand.job) for errand in errands]
        board = Board(errands, jobs)
        board.follow(lambda: True)
        assert [board.is_right(i) for i in range(len(errands))] == [True] * 5 + [False]
        jobs[-1].cancel()


def test_a_worker_is_waited_for_as_long_as_it_says_that_it_loads(
    monkeypatch: pytest.MonkeyPatch, redis_url: str, client: Client, tmp_path: Path
) -> None:
    monkeypatch.setattr(local_worker, "QUIET_SECONDS", LOAD_SECONDS - 3.0)
    settings = {"CELERY_WORKER_INCLUDE": "tests.acceptance.slow_echo", "PYTHONPATH": PYTHONPATH}
    with LocalWorker(redis_url, tmp_path / "log", settings):
        assert client.submit(prompt="there").result(timeout=60).answer == "there"


def test_a_worker_that_ends_before_it_is_ready_is_told_of_with_its_log(redis_url: str, tmp_path: Path) -> None:
    worker = LocalWorker(redis_url, tmp_path / "log", {"KEYE_MODEL_PATH": "/nowhere"})
    with pytest.raises(RuntimeError, match=r"(?s)ended before it was ready. Its log:.*/nowhere"), worker:
        pass
