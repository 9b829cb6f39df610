"""What the supervisor does about children that cannot live. The children are real processes."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from keye.worker.daemon import supervisor
from keye.worker.daemon.exit_codes import ExitCode
from keye.worker.daemon.supervisor import Supervisor
from keye.worker.telemetry.health import HostFolder


@pytest.fixture
def host_folder(tmp_path: Path) -> Iterator[HostFolder]:
    with closing(HostFolder(tmp_path)) as folder:
        yield folder


@pytest.fixture
def children_die_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """They read their settings first, and find a wrong one."""
    monkeypatch.setenv("KEYE_CONCURRENCY", "0")


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
