"""stdout and stderr that are full and unread: a stuck `docker logs`, a terminal after Ctrl-S, a stuck journal."""

import os
import re
import signal
import socket
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

import pytest
from redis import Redis

from keye.config.codes import JobState
from keye.config.presence import Presence, WorkerState, list_present
from keye.producer import Client
from keye.worker.daemon.exit_codes import ExitCode
from tests.acceptance.conftest import ECHO, faulty_engine
from tests.support.checkout import PYTHONPATH
from tests.support.conditions import eventually
from tests.support.ports import free_port

RUN = ("keye.worker.daemon.cli", "run")
OURS = ("celery", "-A", "keye.worker.tasks.celery_app", "worker", "--pool", "threads", "--loglevel", "INFO")
ECHOING = {"CELERY_WORKER_INCLUDE": "tests.acceptance.echo_engine"}
# Each is four lines and more, of which 5,000 wait.
MANY_JOBS = 1500


def stuff(writer: int) -> None:
    """Until it takes nothing any more, not even a byte."""
    os.set_blocking(writer, False)
    for size in (4096, 1):
        with suppress(BlockingIOError):
            while True:
                os.write(writer, b"x" * size)
    os.set_blocking(writer, True)


def pipe(_: Path) -> tuple[int, int]:
    reader, writer = os.pipe()
    stuff(writer)
    return reader, writer


def named_pipe(folder: Path) -> tuple[int, int]:
    os.mkfifo(path := folder / "log")
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    stuff(writer := os.open(path, os.O_WRONLY))
    return reader, writer


def stopped_terminal(_: Path) -> tuple[int, int]:
    reader, writer = os.openpty()
    termios.tcflow(writer, termios.TCOOFF)
    return reader, writer


def journal(_: Path) -> tuple[int, int]:
    reader, writer = socket.socketpair()
    stuff(writer.fileno())
    return reader.detach(), writer.detach()


Stuck = Callable[[Path], tuple[int, int]]
STUCK: list[Stuck] = [pipe, named_pipe, stopped_terminal, journal]


@dataclass
class Deaf:
    """A worker whose words nobody takes."""

    process: subprocess.Popen[bytes]
    redis: Redis

    def wait_until_ready(self) -> Presence:
        def look() -> Presence | None:
            assert self.process.poll() is None
            return next((each for each in list_present(self.redis) if each.state is WorkerState.READY), None)

        return eventually(look, within_seconds=150)


StartDeaf = Callable[..., Deaf]


@pytest.fixture
def start_deaf(redis: Redis, redis_url: str, checkpoint: Path, tmp_path: Path) -> Iterator[StartDeaf]:
    with ExitStack() as ending:

        def run(stuck: Stuck, *command: str, **settings: str) -> Deaf:
            environ = os.environ | {
                "PYTHONPATH": PYTHONPATH,
                "KEYE_REDIS_URL": redis_url,
                "KEYE_MODEL_PATH": str(checkpoint),
                "KEYE_DEVICE": "cpu",
                "KEYE_RUN_FOLDER": str(tmp_path / "run"),
                "KEYE_SPOOL_FOLDER": str(tmp_path / "spool"),
                **settings,
            }
            reader, writer = stuck(tmp_path)
            process = subprocess.Popen(
                [sys.executable, "-m", *command], env=environ, stdout=writer, stderr=writer, cwd=tmp_path
            )
            for end in (writer, reader):
                ending.callback(os.close, end)
            ending.callback(process.wait)
            ending.callback(process.kill)
            return Deaf(process, redis)

        yield run


@pytest.mark.parametrize(
    ("command", "stuck"), [*((RUN, stuck) for stuck in STUCK), (ECHO, pipe), (ECHO, stopped_terminal)]
)
def test_a_worker_with_a_stuck_log_answers_and_hears(
    command: tuple[str, ...], stuck: Stuck, start_deaf: StartDeaf, client: Client
) -> None:
    worker = start_deaf(stuck, *command, **ECHOING)
    pid = worker.wait_until_ready().worker.pid
    # Celery tells from its signal's handler, in the thread that consumes, where all threads stand.
    os.kill(pid, signal.SIGUSR1)
    for prompt in ("one", "two"):
        assert client.submit(prompt=prompt).result(timeout=60).answer == prompt
    worker.process.terminate()
    assert worker.process.wait(30) == ExitCode.OK


@pytest.mark.parametrize("command", [RUN, ECHO], ids=["keye-worker run", "celery"])
def test_a_second_signal_forces_the_end(command: tuple[str, ...], start_deaf: StartDeaf, client: Client) -> None:
    worker = start_deaf(pipe, *command, **ECHOING)
    worker.wait_until_ready()
    job = client.submit(prompt="wait 600")
    eventually(lambda: job.state is JobState.RUNNING)
    worker.process.terminate()
    eventually(lambda: any(each.state is WorkerState.DRAINING for each in list_present(worker.redis)))
    worker.process.terminate()
    assert worker.process.wait(15) == ExitCode.FORCED


@pytest.mark.parametrize(
    ("stuck", "fault", "code"), [(pipe, "hang", ExitCode.STEP_HUNG), (pipe, "freeze", 1), (journal, "freeze", 1)]
)
def test_a_hung_step_ends_its_process(
    stuck: Stuck, fault: str, code: int, start_deaf: StartDeaf, client: Client, tmp_path: Path
) -> None:
    file = tmp_path / "fault"
    worker = start_deaf(stuck, *OURS, KEYE_STEP_SECONDS="3", **faulty_engine(file))
    worker.wait_until_ready()
    file.write_text(fault)
    client.submit(prompt="What is this?")
    assert worker.process.wait(90) == code


def test_a_hung_job_ends_its_process(start_deaf: StartDeaf, client: Client) -> None:
    worker = start_deaf(pipe, *ECHO, CELERY_WORKER_INCLUDE="tests.acceptance.impatient_watch")
    worker.wait_until_ready()
    client.submit(prompt="hang", deadline_seconds=1)
    assert worker.process.wait(60) == ExitCode.JOB_HUNG


def test_lines_that_nobody_takes_are_counted(start_deaf: StartDeaf, client: Client) -> None:
    port = free_port()

    def is_counted() -> bool:
        told = urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
        return float(re.findall("^keye_log_lines_dropped_total (.+)$", told, re.MULTILINE)[0]) > 0

    start_deaf(pipe, *RUN, KEYE_METRICS_PORT=str(port), KEYE_LOG_LEVEL="DEBUG", **ECHOING).wait_until_ready()
    jobs = client.submit_many([{"prompt": "say"}] * MANY_JOBS)
    assert all(end.answer == "say" for _, end in client.results(jobs, timeout=120))
    eventually(is_counted)
