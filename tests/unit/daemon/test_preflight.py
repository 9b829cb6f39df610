"""What must be right before a worker starts. The broker is a real Valkey."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from keye.config.settings import Settings
from keye.worker.daemon.findings import Finding, Severity, as_message, select
from keye.worker.daemon.gpus import visible_gpus
from keye.worker.daemon.preflight import (
    check_before_start,
    check_device,
    check_media_cache,
    check_media_roots,
    check_metrics_address,
    check_model_files,
    check_precision,
    check_sandbox,
    check_setting_names,
    check_shares,
    check_spool,
    check_video_decoder,
)
from keye.worker.media.decode import sandbox

CHECKPOINT = Path(__file__).resolve().parents[2] / "golden" / "preview" / "checkpoint"


def faults(findings: list[Finding]) -> list[str]:
    return [finding.subject for finding in select(findings, Severity.FAULT)]


def test_a_right_set_up_has_nothing_to_complain_about(redis_url: str, tmp_path: Path) -> None:
    settings = Settings(
        redis_url=redis_url,
        model_path=CHECKPOINT,
        media_roots=(tmp_path,),
        device="cpu",
        cache_bytes=2**20,
        spool_folder=tmp_path / "spool",
    )
    findings = check_before_start(settings, gpus=[])
    assert {finding.severity for finding in findings} == {Severity.OK}


@pytest.mark.holds(
    "docs/operations.md#it-does-not-start-why",
    "a `KEYE_` name that is no setting, in the environment or `.env`, is a warning",
)
def test_a_misspelt_setting_is_warned_about_with_the_name_that_was_meant() -> None:
    (finding,) = check_setting_names(["KEYE_MODEL_PATH", "KEYE_MEDIA_ROOT"])
    assert finding.severity is Severity.WARNING
    assert str(finding) == (
        "settings: KEYE_MEDIA_ROOT is no setting and changes nothing. Did you mean KEYE_MEDIA_ROOTS?"
    )


@pytest.mark.holds("docs/operations.md#it-does-not-start-why", "tells all faults in one message, each with what to do")
def test_every_fault_is_in_one_message(tmp_path: Path) -> None:
    settings = Settings(
        redis_url="redis://127.0.0.1:1/0", model_path=tmp_path / "none", device="cuda", media_roots=(tmp_path / "gone",)
    )
    findings = check_before_start(settings, gpus=[])
    assert faults(findings) == ["broker", "checkpoint", "device", "media roots"]
    message = as_message(select(findings, Severity.FAULT))
    assert message.startswith("preflight: 4 faults:")
    assert all(part in message for part in ("127.0.0.1:1", str(tmp_path / "none"), "cuda", str(tmp_path / "gone")))
    assert ".." not in message


def test_falling_back_to_the_cpu_beside_a_driver_is_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho Driver/library version mismatch >&2\nexit 18\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert check_device("auto", visible_gpus("auto", {})).severity is Severity.WARNING
    assert check_device("cpu", []).severity is Severity.OK


def test_a_media_root_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").touch()
    assert faults(list(check_media_roots([tmp_path, tmp_path / "clip.mp4"]))) == ["media roots"]


@pytest.mark.holds(
    "docs/operations.md#what-can-a-broken-or-hostile-file-do",
    "`keye-worker doctor` says what each one gets, and warns",
    "Allow for that memory twice, plus 100 MB a child (450 with torchcodec).",
)
def test_shares_that_the_hosts_memory_does_not_hold_are_warned_about() -> None:
    finding = check_shares(Settings(host_workers=4, decoders=8, max_decoded_bytes=4 * 2**30), 16, 32 * 2**30)
    assert finding.severity is Severity.WARNING
    assert "4 workers with 8 decoders and 4.0 GiB for pixels each may take 35.0 GiB" in finding.found
    finding = check_shares(Settings(host_workers=4, decoders=4, max_decoded_bytes=2**30), 16, 32 * 2**30)
    assert finding.severity is Severity.OK
    assert finding.found == "16 cores and 32.0 GiB, for each of 4 workers 4 decoders and 1.0 GiB for pixels"


def test_a_video_decoder_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_video_decoder("pyav").severity is Severity.OK
    # Installed where tests run, and perhaps imported by an earlier one: hidden from whoever looks for it.
    monkeypatch.delitem(sys.modules, "decord", raising=False)
    monkeypatch.setattr(sys, "path", [])
    finding = check_video_decoder("decord")
    assert finding.severity is Severity.FAULT
    assert "pip install decord" in finding.cure


def test_a_precision_whose_package_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [*check_precision("int8"), *check_precision("int4"), *check_precision("auto")] == []
    for package in ("torchao", "bitsandbytes"):
        monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.setattr(sys, "path", [])
    for precision, package in (("int8", "torchao"), ("int4", "bitsandbytes")):
        (finding,) = check_precision(precision)
        assert finding.severity is Severity.FAULT
        assert package in finding.found
        assert "keye-worker[quantised]" in finding.cure


def test_an_address_for_metrics_that_cannot_be_had_is_warned_about() -> None:
    assert list(check_metrics_address("127.0.0.1", None)) == []
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for host in ("127.0.0.1", "no.such.host.invalid", "..", "a" * 70):
            (finding,) = check_metrics_address(host, port)
            assert finding.severity is Severity.WARNING
            assert f"{host}:{port} cannot be had" in finding.found
    (finding,) = check_metrics_address("127.0.0.1", port)
    assert finding.severity is Severity.OK


def test_a_checkpoint_whose_path_is_no_path_is_refused() -> None:
    finding = check_model_files(Path("/" + "n" * 300))
    assert finding.severity is Severity.FAULT
    assert "File name too long" in finding.found


@pytest.mark.holds(
    "docs/operations.md#what-can-a-broken-or-hostile-file-do",
    "Where a kernel lacks one of the two, a worker names it at its start",
)
def test_machine_whose_decoders_are_less_confined_is_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_sandbox().severity is Severity.OK
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    finding = check_sandbox()
    assert finding.severity is Severity.WARNING
    assert "no seccomp filters for this machine" in str(finding)
    monkeypatch.setattr(sandbox, "_landlock_version", lambda: 0)
    assert "for this machine and no Landlock" in str(check_sandbox())


def test_a_cache_folder_that_cannot_be_had_is_refused_and_one_without_room_warned_about(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file/below"):
        assert check_media_cache(folder, 2**20).severity is Severity.FAULT
    (tmp_path / "other/partial").mkdir(parents=True)
    (tmp_path / "other/whole").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    for folder in (Path("/proc/keye"), tmp_path / ("n" * 300), tmp_path / "other", tmp_path / "dangling"):
        assert check_media_cache(folder, 2**20).severity is Severity.FAULT
    assert check_media_cache(tmp_path / "new/folder", 2**20).severity is Severity.OK
    assert not (tmp_path / "new").exists()
    assert check_media_cache(tmp_path / "new/folder", 2**60).severity is Severity.WARNING


def test_a_spool_folder_that_cannot_be_had_is_warned_about(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file/below"):
        assert check_spool(folder).severity is Severity.WARNING
        assert "KEYE_SPOOL_FOLDER" in check_spool(folder).cure
    assert check_spool(tmp_path / "new/folder").severity is Severity.OK


def test_checking_never_loads_torch(redis_url: str) -> None:
    """CUDA that was touched in the parent cannot be pinned, nor used, in its children."""
    code = (
        "import os, sys; from keye.config.settings import Settings;"
        "from keye.worker.daemon.preflight import check_before_start;"
        "from keye.worker.daemon.gpus import visible_gpus;"
        f"settings = Settings(redis_url={redis_url!r}, model_path={str(CHECKPOINT)!r});"
        "check_before_start(settings, visible_gpus('auto', os.environ));"
        "print('torch' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"
