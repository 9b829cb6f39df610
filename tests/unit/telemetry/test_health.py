"""What a probe makes of the files of a host's workers."""

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from keye.config.settings import Settings
from keye.worker.daemon import entry
from keye.worker.daemon.findings import Severity
from keye.worker.daemon.preflight import check_run_folder
from keye.worker.telemetry import health
from keye.worker.telemetry.health import Health, Heartbeat, HostFolder, judge_host
from tests.support import neighbour
from tests.support.neighbour import needs_root


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
    as_json = run_probe("--ready", "--json", cwd=tmp_path)
    told = {"is_live": True, "is_ready": False, "reason": "cpu loading"}
    assert (as_json.returncode, json.loads(as_json.stdout)) == (1, told)
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


@pytest.fixture
def shared() -> Iterator[Path]:
    with neighbour.shared_folder() as shared:
        yield shared


@needs_root
@pytest.mark.parametrize(
    "script",
    ["mkdir -m 777 $1", "ln -s $2 $1", "mkdir $1; mkdir $1/1; ln -s $2/file $1/1/lock", "mkdir $1; mkfifo $1/1"],
)
def test_a_run_folder_that_another_user_made_first_is_refused(shared: Path, script: str) -> None:
    (shared / "ours").mkdir()
    (shared / "ours" / "file").touch()
    neighbour.does(script, shared / "run", shared / "ours")
    finding = check_run_folder(shared / "run")
    assert finding.severity is Severity.FAULT
    assert "KEYE_RUN_FOLDER" in finding.cure
    with pytest.raises(OSError, match=str(shared / "run")):
        HostFolder(shared / "run")
    assert [path.name for path in (shared / "ours").iterdir()] == ["file"]


@needs_root
def test_a_start_does_not_wait_for_another_user_who_holds_what_they_may_open(shared: Path) -> None:
    with closing(HostFolder(shared / "run")):
        pass
    # As 0.2 made it, for all to look into.
    (shared / "run").chmod(0o755)
    holding = "flock --nonblock $1 sh -c 'echo held; exec cat'"
    command = ["setpriv", f"--reuid={neighbour.UID}", "--clear-groups", "sh", "-c", holding, "-", str(shared / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/") as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        begun = subprocess.run([sys.executable, "-c", BEGIN, str(shared / "run")], timeout=60, check=True)
        holder.stdin.close()
    assert begun.returncode == 0


BEGIN = """
import pathlib, sys
from keye.worker.telemetry.health import HostFolder
HostFolder(pathlib.Path(sys.argv[1])).close()
"""


@needs_root
def test_what_another_user_says_beside_us_is_not_believed(shared: Path) -> None:
    """In a folder that all may write to: a probe that believed it would have a worker ended."""
    imports = "from pathlib import Path\nfrom keye.worker.telemetry.health import HostFolder, judge_host"
    code = """
shared = Path(sys.argv[1])
ours = HostFolder(shared)
ours.tell({"cpu": "ready"}, is_draining=False)
print("made", flush=True)
sys.stdin.readline()
print(*judge_host(shared), flush=True)
"""
    said = f"""
mkdir $1/1 $1/2 $1/keye-{neighbour.UID}; ln -s $1/1 $1/keye-{neighbour.UID}/3
echo '{{"at": 0, "is_draining": true, "workers": {{"gpu0": "hung"}}}}' > $1/1/workers.json
ln -s /dev/zero $1/2/workers.json; touch $1/1/lock $1/2/lock; mkfifo $1/4
"""
    neighbour.does(said, shared)
    ids = "os.setgroups([]); os.setresgid(999, 999, 999); os.setresuid(999, 999, 999)"
    command = [sys.executable, "-c", f"import os, sys\n{imports}\n{ids}\n{code}", str(shared)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/") as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "made\n"
        locks = [os.open(shared / name / "lock", os.O_RDWR) for name in ("1", "2")]
        for lock in locks:
            fcntl.flock(lock, fcntl.LOCK_EX)
        assert worker.communicate("\n", timeout=60)[0] == "True True cpu ready\n"
        for lock in locks:
            os.close(lock)


@needs_root
def test_a_heartbeat_is_written_through_no_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "cpu.beat").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="Too many levels"):
        Heartbeat(str(tmp_path / "cpu.beat"))
    assert (tmp_path / "precious").read_bytes() == b"precious"
