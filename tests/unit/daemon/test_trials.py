"""What the doctor tries for real."""

import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from keye.config.settings import Settings
from keye.worker.daemon import trials
from keye.worker.daemon.findings import Severity
from keye.worker.daemon.trials import (
    check_compiler,
    check_decoders,
    check_s3,
    check_torch_sees_gpus,
    try_answer,
)
from keye.worker.model import attention_choice, cuda_attention, item_attention
from keye.worker.model.device import TorchFacts, torch_facts
from keye.worker.proof.golden_case import GENERATIONS
from tests.support.varlen_on_paper import leaves_split_rows_unwritten, varlen_on_paper


@pytest.fixture
def no_aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No credentials from anywhere."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.mark.holds("docs/operations.md#it-does-not-start-why", "the decoders (a clip is made and read back)")
def test_a_clip_is_made_and_read_back() -> None:
    finding = check_decoders("pyav")
    assert finding.severity is Severity.OK
    assert finding.found.startswith("8 frames of H.264 read back")


def test_decoders_that_cannot_be_started_are_a_fault_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/gone")
    finding = check_decoders("pyav")
    assert finding.severity is Severity.FAULT
    assert "No decoder can be started: [Errno 2] No such file" in finding.found


@pytest.mark.holds("docs/operations.md#it-does-not-start-why", "S3 credentials")
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


CPU_BUILD = TorchFacts("2.14.1+cpu", None, 8, gpus=())
OLD_DRIVER = TorchFacts("2.14.1", "13.0", 8, gpus=())
ONE_GPU = TorchFacts("2.14.1", "13.0", 8, gpus=(("NVIDIA L4", 24 * 2**30),))


@pytest.mark.holds("docs/operations.md#it-does-not-start-why", "whether torch can use the GPU")
@pytest.mark.parametrize(
    ("torch", "gpus", "severity"),
    [
        (CPU_BUILD, [], Severity.OK),
        (CPU_BUILD, ["GPU-a"], Severity.FAULT),
        (OLD_DRIVER, ["GPU-a"], Severity.FAULT),
        (ONE_GPU, ["GPU-a", "GPU-b"], Severity.FAULT),
        (ONE_GPU, ["GPU-a"], Severity.OK),
        (ONE_GPU, ["MIG-a", "MIG-b", "GPU-c"], Severity.OK),  # CUDA shows a process one slice and nothing beside it
        (OLD_DRIVER, ["MIG-a"], Severity.FAULT),
    ],
)
def test_every_gpu_of_the_driver_must_be_usable_by_torch(
    torch: TorchFacts, gpus: list[str], severity: Severity
) -> None:
    assert check_torch_sees_gpus(gpus, torch).severity is severity


def test_a_compiler_is_missed_only_where_attention_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    with_one = replace(ONE_GPU, compiler="/usr/bin/gcc")
    for has_block_tables, facts, severities in (
        (False, ONE_GPU, [Severity.WARNING]),
        (False, with_one, []),
        (True, ONE_GPU, []),
    ):
        monkeypatch.setattr(trials, "HAS_BLOCK_TABLES", has_block_tables)
        assert [finding.severity for finding in check_compiler(facts)] == severities


def test_what_stands_below_torch_is_named() -> None:
    below = replace(ONE_GPU, driver="580.159", cudnn=91900, triton="3.8.0", compiler="/usr/bin/gcc")
    found = check_torch_sees_gpus(["GPU-a"], below).found
    assert found.startswith("torch 2.14.1 for CUDA 13.0")
    assert found.endswith("driver 580.159, cuDNN 91900, triton 3.8.0, C compiler /usr/bin/gcc")


def plant_wrong_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device with a faster form that leaves rows unwritten, and one that cannot be compiled."""

    def find_no_compiler() -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(attention_choice, "has_packed_kernels", lambda *_: True)
    monkeypatch.setattr(attention_choice, "HAS_BLOCK_TABLES", True)
    monkeypatch.setattr(cuda_attention, "varlen_attn", leaves_split_rows_unwritten)
    monkeypatch.setattr(cuda_attention, "_compiled_flex_attention", find_no_compiler)
    monkeypatch.setattr(item_attention, "varlen_attn", varlen_on_paper)


@pytest.mark.holds("docs/operations.md#are-its-numbers-right-on-this-machine", "a warning of `doctor`")
def test_attention_that_is_wrong_is_a_warning_with_the_form_that_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    plant_wrong_attention(monkeypatch)
    settings = Settings(model_path=GENERATIONS["Keye"] / "checkpoint", device="cpu")
    attention, smoke_job = try_answer(settings)
    assert attention.severity is Severity.WARNING
    assert "attention by varlen_attn over block tables is wrong here: off by up to" in attention.found
    assert "scaled_dot_product_attention over gathered blocks" in attention.cure
    assert smoke_job.severity is Severity.OK


def test_torch_says_what_it_can_use_here() -> None:
    assert torch_facts().num_threads >= 1
