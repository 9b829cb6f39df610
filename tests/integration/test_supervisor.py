"""What the supervisor does about children that cannot live. The children are real processes."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from keye.worker.daemon import supervisor
from keye.worker.daemon.exit_codes import ExitCode
from keye.worker.daemon.supervisor import Supervisor
from keye.worker.telemetry.health import Health, HostFolder


@pytest.fixture
def host_folder(tmp_path: Path) -> Iterator[HostFolder]:
    with closing(HostFolder(tmp_path)) as folder:
        yield folder


@pytest.fixture
def children_die_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """They read their settings first, and find a wrong one."""
    monkeypatch.setenv("KEYE_CONCURRENCY", "0")


@pytest.mark.holds(
    "docs/operations.md#a-worker-was-killed-or-its-machine-is-gone-what-must-i-do",
    "When all are given up, it ends with 14.",
)
@pytest.mark.usefixtures("children_die_at_once")
def test_a_child_that_never_becomes_ready_is_given_up_aloud(
    host_folder: HostFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(supervisor, "MAX_DEATHS_BEFORE_READY", 2)
    assert Supervisor(host_folder, gpus=[], drain_seconds=5).run() is ExitCode.CHILD_NEVER_READY
    assert "2 times in a row before it was ready: giving up" in caplog.text


@pytest.mark.usefixtures("children_die_at_once")
def test_a_signal_ends_the_wait_for_a_revival_and_leaves_the_handlers_as_they_were(
    host_folder: HostFolder, caplog: pytest.LogCaptureFixture
) -> None:
    def signal_during_the_pause() -> None:
        while "it is started again in 1 s" not in caplog.text:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    operator = threading.Thread(target=signal_during_the_pause)
    operator.start()
    assert Supervisor(host_folder, gpus=[], drain_seconds=5).run() is ExitCode.OK
    operator.join()
    assert signal.getsignal(signal.SIGTERM) is before


# Ready at once, with what it was given; deaf to SIGTERM.
DEAF = """#!{python}
import os, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
told = os.environ["CUDA_VISIBLE_DEVICES"], os.environ["KEYE_DEVICE"], os.environ["KEYE_HOST_WORKERS"]
pathlib.Path({folder!r}, told[0]).write_text(" ".join(told))
pathlib.Path(os.environ["KEYE_HEARTBEAT"]).write_text(f"ready {{time.monotonic()}}")
time.sleep(60)
"""


@pytest.mark.holds(
    "docs/reliability.md#promises",
    "SIGTERM takes the drain's time,",
)
@pytest.mark.holds(
    "docs/design.md#decisions",
    "supervises a child per GPU, pinned by `CUDA_VISIBLE_DEVICES`",
    "One process per GPU",
)
@pytest.mark.holds("docs/operations.md#which-gpus-are-used", "Each process sees only its own.")
@pytest.mark.holds(
    "docs/operations.md#how-do-i-stop-or-restart-a-worker-without-losing-jobs",
    "(or press Ctrl-C)",
    "What hangs 10 seconds longer is cut off (15)",
)
@pytest.mark.holds("docs/operations.md#how-did-a-process-end", "`15` | DRAIN_INCOMPLETE")
def test_each_child_sees_one_gpu_and_one_that_outlasts_the_drain_is_cut_off(
    host_folder: HostFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    deaf = tmp_path / "deaf"
    deaf.write_text(DEAF.format(python=sys.executable, folder=str(tmp_path)))
    deaf.chmod(0o755)
    monkeypatch.setattr(supervisor.sys, "executable", str(deaf))
    monkeypatch.setattr(supervisor, "KILL_MARGIN_SECONDS", 0.5)

    def press_ctrl_c_once_all_are_ready() -> None:
        while not all(health is Health.READY for health, _ in running.workers().values()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    running = Supervisor(host_folder, gpus=["GPU-a", "MIG-b"], drain_seconds=0.5, host_workers=2)
    operator = threading.Thread(target=press_ctrl_c_once_all_are_ready)
    operator.start()
    assert running.run() is ExitCode.DRAIN_INCOMPLETE
    operator.join()
    assert (tmp_path / "GPU-a").read_text() == "GPU-a cuda 2"
    assert (tmp_path / "MIG-b").read_text() == "MIG-b cuda 2"
