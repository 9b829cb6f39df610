"""`keye batch run` is ended, refused, or has nowhere to write: it says so, and the same command goes on from there."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from keye.config import keys
from keye.config.job import Priority
from keye.producer.shell import ExitCode
from tests.integration.batch.conftest import Answering
from tests.support.checkout import PYTHONPATH
from tests.support.conditions import eventually
from tests.support.mounts import mounted

NUM_LINES = 40


class Command:
    """`keye batch run` in a folder; all that were begun are killed in the end."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder
        self._environ = os.environ | {"PYTHONPATH": PYTHONPATH, "KEYE_REDIS_URL": url}
        self._begun: list[subprocess.Popen[str]] = []

    def begin(self, *options: str, output: str = "out.jsonl", **streams: Any) -> subprocess.Popen[str]:
        run = [sys.executable, "-m", "keye", "batch", "run", "in.jsonl", "-o", output, *options]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
        process = subprocess.Popen(run, cwd=self.folder, env=self._environ, text=True, **streams)
        self._begun.append(process)
        return process

    def end(self) -> None:
        for each in self._begun:
            each.kill()
            each.communicate()


@pytest.fixture
def command(redis_url: str, tmp_path: Path) -> Iterator[Command]:
    lines = ({"custom_id": f"c{number}", "prompt": f"say {number}"} for number in range(NUM_LINES))
    (tmp_path / "in.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    command = Command(tmp_path, redis_url)
    yield command
    command.end()


def is_whole(path: Path) -> bool:
    found = Counter(json.loads(line)["custom_id"] for line in path.read_text().splitlines())
    return found == Counter(f"c{number}" for number in range(NUM_LINES))


def wait_for_jobs(redis: Redis, num_jobs: int) -> None:
    eventually(lambda: redis.zcard(keys.queued(Priority.LOW)) == num_jobs)


@pytest.mark.holds(
    "docs/batches.md#how-do-i-ask-about-a-whole-bucket-or-a-file-of-a-million-questions",
    "Whatever ended it, be it Ctrl-C, kill -9",
)
def test_whoever_ends_it_hears_how_to_go_on_and_goes_on(command: Command, redis: Redis, tmp_path: Path) -> None:
    ends = ((signal.SIGINT, ExitCode.INTERRUPTED), (signal.SIGTERM, ExitCode.TERMINATED), (signal.SIGHUP, -1))
    for in_flight, (number, code) in zip((10, 20, 30), ends, strict=True):
        process = command.begin("--in-flight", str(in_flight))
        wait_for_jobs(redis, in_flight)
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
        assert (process.returncode, out) == (code, "")
        if code > 0:
            assert err.splitlines()[-1].endswith("The same command goes on from here.")
    with Answering(redis) as answering:
        assert command.begin().wait(60) == ExitCode.OK
    assert is_whole(tmp_path / "out.jsonl")
    assert set(answering.times.values()) == {1}


def test_a_second_one_is_refused_and_the_first_goes_on(command: Command, redis: Redis, tmp_path: Path) -> None:
    first = command.begin("--in-flight", "10")
    wait_for_jobs(redis, 10)
    second = command.begin()
    _, err = second.communicate(timeout=30)
    assert second.returncode == ExitCode.INVALID
    assert err.startswith("out.jsonl.journal is in use: this batch is running already.")
    with Answering(redis) as answering:
        assert first.wait(60) == ExitCode.OK
    assert is_whole(tmp_path / "out.jsonl")
    assert set(answering.times.values()) == {1}


def _closed() -> None:
    os.close(1)
    os.close(2)


def test_it_answers_all_where_nobody_can_read_what_it_says(command: Command, redis: Redis, tmp_path: Path) -> None:
    with Answering(redis):
        process = command.begin(stdout=None, stderr=None, preexec_fn=_closed)
        process.wait(60)
    assert is_whole(tmp_path / "out.jsonl")


@pytest.mark.holds(
    "docs/batches.md#what-if-something-dies",
    "the disk of the output | the command ends with 74",
)
@pytest.mark.holds(
    "docs/batches.md#from-python",
    "`OutputUnwritable` where the disk takes no more",
)
@pytest.mark.parametrize("leave", [0, 70_000])
def test_a_full_disk_is_told_and_gone_on_from_once_there_is_room(
    command: Command, redis: Redis, tmp_path: Path, leave: int
) -> None:
    full = tmp_path / "full"
    with mounted(full), Answering(redis) as answering:
        room = os.statvfs(full)
        filler = full / "filler"
        filler.write_bytes(b"0" * (room.f_bavail * room.f_bsize - leave))
        process = command.begin(output="full/out.jsonl")
        _, err = process.communicate(timeout=60)
        assert process.returncode == ExitCode.UNWRITABLE, err
        assert "full/out.jsonl" in err
        assert "No space left on device" in err or "disk is full" in err, err
        assert err.endswith("begin this again: it goes on where it was.\n")
        filler.unlink()
        process = command.begin(output="full/out.jsonl")
        _, err = process.communicate(timeout=60)
        assert process.returncode == ExitCode.OK, err
        assert is_whole(full / "out.jsonl")
        assert set(answering.times.values()) == {1}
