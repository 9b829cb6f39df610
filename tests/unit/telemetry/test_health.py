"""What a probe makes of the files of a host's workers."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from keye.config.settings import Settings
from keye.worker.daemon import entry
from keye.worker.telemetry import health
from keye.worker.telemetry.health import Health, Heartbeat, HostFolder, judge_host


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[HostFolder]:
    with closing(HostFolder(tmp_path)) as folder:
        yield folder


@pytest.mark.holds("docs/operations.md#is-it-up-and-is-it-taking-jobs", "A worker is live while it loads")
@pytest.mark.parametrize(
    ("workers", "is_draining", "is_live", "is_ready"),
    [
        pytest.param({}, False, True, False, id="none-yet"),
        pytest.param({"gpu0": Health.LOADING}, False, True, False, id="loading"),
        pytest.param({"gpu0": Health.READY, "gpu1": Health.LOADING}, False, True, True, id="one-ready"),
        pytest.param({"gpu0": Health.READY, "gpu1": Health.GIVEN_UP}, False, True, True, id="one-given-up"),
        pytest.param({"gpu0": Health.WAITING}, False, True, False, id="to-be-started-again"),
        pytest.param({"gpu0": Health.READY, "gpu1": Health.HUNG}, False, False, False, id="one-hung"),
        pytest.param({"gpu0": Health.DRAINING}, True, True, False, id="draining"),
        pytest.param({"gpu0": Health.READY}, True, True, False, id="draining-begins"),
    ],
)
def test_live_and_ready(
    folder: HostFolder, workers: dict[str, Health], is_draining: bool, is_live: bool, is_ready: bool
) -> None:
    folder.tell(workers, is_draining=is_draining)
    verdict = judge_host(folder.path.parent)
    assert (verdict.is_live, verdict.is_ready) == (is_live, is_ready)
    assert all(worker in verdict.reason for worker in workers)


@pytest.mark.holds("docs/operations.md#is-it-up-and-is-it-taking-jobs", "it is not once it has not beaten for 30 s")
def test_a_worker_is_what_it_beats_until_it_falls_silent(folder: HostFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    assert folder.health_of("cpu") is Health.LOADING
    heartbeat = Heartbeat(str(folder.heartbeat_of("cpu")))
    for state in (Health.LOADING, Health.READY, Health.DRAINING, Health.READY):
        heartbeat.state = state
        heartbeat.beat()
        assert folder.health_of("cpu") is state
    monkeypatch.setattr(health, "HUNG_AFTER_SECONDS", -1)
    assert folder.health_of("cpu") is Health.HUNG
    heartbeat.state = Health.LOADING
    heartbeat.beat()
    assert folder.health_of("cpu") is Health.LOADING, "a load has its own limit, KEYE_LOAD_SECONDS"
    folder.forget("cpu")
    assert folder.health_of("cpu") is Health.LOADING


@pytest.mark.holds("docs/operations.md#is-it-up-and-is-it-taking-jobs", "or its supervisor not for 15")
def test_a_silent_supervisor_is_not_live(folder: HostFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.tell({"cpu": Health.READY}, is_draining=False)
    monkeypatch.setattr(health, "SILENT_AFTER_SECONDS", -1)
    verdict = judge_host(folder.path.parent)
    assert (verdict.is_live, verdict.is_ready) == (False, False)
    assert "silent" in verdict.reason


def test_a_supervisor_that_was_killed_is_gone_and_tidied_up(tmp_path: Path) -> None:
    code = f"""
import os, pathlib
from keye.worker.telemetry.health import HostFolder
HostFolder(pathlib.Path({str(tmp_path)!r}))
os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    (left,) = tmp_path.iterdir()
    assert not judge_host(tmp_path).is_live
    with closing(HostFolder(tmp_path)) as folder:
        assert not left.exists() or left == folder.path
        assert judge_host(tmp_path).is_live
    assert list(tmp_path.iterdir()) == []


def run_probe(*options: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "importtime", "-m", "keye.worker.daemon.entry", "probe", *options]
    own = {name: value for name, value in os.environ.items() if not name.startswith("KEYE_")}
    return subprocess.run(command, cwd=cwd, env=own | environ, capture_output=True, text=True)


@pytest.mark.holds("docs/operations.md#how-did-a-process-end", "2 is a wrong command line")
def test_the_probe_finds_its_folder_in_the_environment_and_in_env_files(folder: HostFolder, tmp_path: Path) -> None:
    folder.tell({"cpu": Health.LOADING}, is_draining=False)
    (tmp_path / ".env").write_text(f"KEYE_RUN_FOLDER={tmp_path}\n")
    for found in (run_probe(cwd=tmp_path), run_probe("--live", cwd=Path("/"), KEYE_RUN_FOLDER=str(tmp_path))):
        assert (found.returncode, found.stdout) == (0, "live: cpu loading\n")
    not_ready = run_probe("--ready", cwd=tmp_path)
    assert (not_ready.returncode, not_ready.stdout) == (1, "not ready: cpu loading\n")
    assert run_probe("--alive", cwd=tmp_path).returncode == 2
    nobody = run_probe(cwd=tmp_path, KEYE_RUN_FOLDER="/nowhere")
    assert nobody.returncode == 1
    assert "KEYE_RUN_FOLDER" in nobody.stdout
    assert Settings.model_fields["run_folder"].default == Path(entry.RUN_FOLDER)


@pytest.mark.holds("docs/design.md#decisions", "A probe must answer while Redis is away, within a fifth of a second")
@pytest.mark.holds("docs/deploy.md#kubernetes", "One that Redis does not answer stays live")
@pytest.mark.holds("docs/operations.md#is-it-up-and-is-it-taking-jobs", "asks neither Redis nor HTTP")
def test_a_probe_imports_nothing_that_takes_long(tmp_path: Path) -> None:
    imported = run_probe(cwd=tmp_path).stderr
    assert "keye.worker.telemetry.health" in imported
    assert not [
        name for name in ("pydantic", "typer", "redis", "celery", "prometheus_client") if f" {name}\n" in imported
    ]
