"""The demo is ended by a signal at any moment: nothing that it started is left, and nothing that it wrote."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.conditions import eventually
from tests.support.started_processes import living

DEMO = "from keye.worker.daemon.cli import main; main()"
# Whoever runs the tests in the background has children ignore it.
HEARING = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "


@contextmanager
def started(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """The demo and its output; its temporary files are below `folder`, in "temporary"."""
    (folder / "temporary").mkdir()
    environ = os.environ | {"TMPDIR": str(folder / "temporary"), "KEYE_CACHE_FOLDER": str(folder)}
    output = folder / "output"
    with output.open("wb") as out:
        command = [sys.executable, "-c", HEARING + DEMO, "demo"]
        demo = subprocess.Popen(command, env=environ, cwd=folder, stdout=out, stderr=out, start_new_session=True)
    try:
        yield demo, output
    finally:
        demo.kill()
        demo.wait()


def left(folder: Path) -> list[Path]:
    # What torch compiled is kept for the next.
    return [path for path in (folder / "temporary").iterdir() if not path.name.startswith("keye-compiled-")]


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGTERM, "starting a worker"),
        (signal.SIGTERM, "Worker ready"),
        (signal.SIGTERM, "ended as expected"),
        (signal.SIGINT, "Worker ready"),
        (signal.SIGHUP, "starting a worker"),
    ],
)
def test_by_one_that_it_hears(number: signal.Signals, said: str, tmp_path: Path) -> None:
    with started(tmp_path) as (demo, output):
        eventually(lambda: said in output.read_text(), within_seconds=120)
        assert living(tmp_path)
        demo.send_signal(number)
        assert demo.wait(30) == -number, output.read_text()
    eventually(lambda: not living(tmp_path))
    assert left(tmp_path) == []


def test_before_it_says_anything(tmp_path: Path) -> None:
    with started(tmp_path) as (demo, output):
        # Its server is on the way.
        eventually(lambda: len(living(tmp_path)) > 1, within_seconds=60)
        demo.terminate()
        assert demo.wait(30) == -signal.SIGTERM, output.read_text()
    eventually(lambda: not living(tmp_path))
    assert left(tmp_path) == []


@pytest.mark.parametrize("said", ["starting a worker", "Worker ready"])
def test_by_sigkill(said: str, tmp_path: Path) -> None:
    with started(tmp_path) as (demo, output):
        eventually(lambda: said in output.read_text(), within_seconds=120)
        demo.kill()
    eventually(lambda: not living(tmp_path))
