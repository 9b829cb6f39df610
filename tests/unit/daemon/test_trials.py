"""What the doctor tries for real."""

import socket
from pathlib import Path

import pytest

from worker.daemon.findings import Severity
from worker.daemon.trials import check_decoders, check_s3, check_torch_sees_gpus


@pytest.fixture
def no_aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No credentials from anywhere."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def test_a_clip_is_made_and_read_back() -> None:
    finding = check_decoders()
    assert finding.severity is Severity.OK
    assert finding.found.startswith("8 frames of H.264 read back")


@pytest.mark.usefixtures("no_aws")
def test_missing_s3_credentials_are_a_warning_with_a_cure() -> None:
    finding = check_s3(None)
    assert finding.severity is Severity.WARNING
    assert "AWS_ACCESS_KEY_ID" in finding.cure


@pytest.mark.usefixtures("no_aws")
def test_an_s3_endpoint_that_does_not_answer_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        finding = check_s3(f"http://127.0.0.1:{closed.getsockname()[1]}")
    assert finding.severity is Severity.WARNING
    assert "KEYE_S3_ENDPOINT_URL" in finding.cure


def test_a_gpu_that_torch_cannot_use_is_a_fault() -> None:
    """Where torch can use one, this machine has nothing to find."""
    import torch

    expected = Severity.OK if torch.cuda.is_available() else Severity.FAULT
    assert check_torch_sees_gpus(["GPU-aaaa"]).severity is expected
    assert check_torch_sees_gpus([]).severity is Severity.OK
