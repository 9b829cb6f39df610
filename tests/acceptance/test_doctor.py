"""`keye-worker doctor` as a machine reads it."""

import json
import os
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from keye.worker.daemon.cli import app
from keye.worker.daemon.exit_codes import ExitCode
from tests.support.pretended_driver import Card, write_nvidia_smi


@pytest.fixture
def environ(redis_url: str, checkpoint: Path, tmp_path: Path) -> dict[str, str]:
    return {
        "KEYE_REDIS_URL": redis_url,
        "KEYE_MODEL_PATH": str(checkpoint),
        "KEYE_MEDIA_ROOTS": str(tmp_path),
        "KEYE_DEVICE": "cpu",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@pytest.mark.holds("docs/alerts.md#keyenoreadyworker", "`keye-worker doctor` on the host tries every step")
@pytest.mark.holds(
    "docs/operations.md#are-its-numbers-right-on-this-machine",
    "`keye-worker doctor` tells how near they are",
    "24 tokens of each case; float32 logits off by 6.9e-06 at most",
)
@pytest.mark.holds(
    "docs/operations.md#it-does-not-start-why",
    "`keye-worker doctor` looks further",
    "`--json` prints one finding a line for machines.",
)
def test_a_right_set_up_ends_with_an_answered_job(environ: dict[str, str]) -> None:
    answer = CliRunner().invoke(app, ["doctor", "--json"], env=environ, catch_exceptions=False)
    findings = [json.loads(line) for line in answer.stdout.splitlines()]
    assert answer.exit_code == ExitCode.OK, findings
    assert [f["subject"] for f in findings if f["severity"] == "fault"] == []
    told = {finding["subject"]: finding["found"] for finding in findings}
    assert re.search(r"preview and v1_5 as the reference: .* float32 logits off by \S+ at most", told["numbers"])
    assert told["attention"].startswith("scaled_dot_product_attention over gathered blocks")
    assert findings[-1]["subject"] == "smoke job"
    assert "answered after" in findings[-1]["found"]


@pytest.mark.holds("docs/operations.md#which-gpus-are-used", "set `KEYE_DEVICE=cuda` to make that a fault instead")
def test_a_device_that_is_not_there_is_one_fault_and_its_numbers_none(environ: dict[str, str]) -> None:
    without = environ | {"KEYE_DEVICE": "cuda", "CUDA_VISIBLE_DEVICES": ""}
    answer = CliRunner().invoke(app, ["doctor", "--json"], env=without, catch_exceptions=False)
    subjects = [f["subject"] for f in map(json.loads, answer.stdout.splitlines()) if f["severity"] == "fault"]
    assert subjects == ["device", "smoke job"]


@pytest.mark.holds("docs/operations.md#it-does-not-start-why", "It ends with 10 when something would stop a worker.")
def test_every_fault_is_told_with_its_cure_and_the_exit_code_says_so(environ: dict[str, str], tmp_path: Path) -> None:
    wrong = environ | {"KEYE_REDIS_URL": "redis://127.0.0.1:1/0", "KEYE_MODEL_PATH": str(tmp_path)}
    answer = CliRunner().invoke(app, ["doctor", "--json"], env=wrong, catch_exceptions=False)
    faults = {f["subject"]: f for f in map(json.loads, answer.stdout.splitlines()) if f["severity"] == "fault"}
    assert answer.exit_code == ExitCode.PREFLIGHT_FAILED
    assert faults.keys() == {"broker", "checkpoint", "smoke job"}
    assert all(fault["cure"] for fault in faults.values())


@pytest.mark.holds("docs/operations.md#it-does-not-start-why", "`--gpus` looks at the same GPUs as `run --gpus`")
def test_the_gpus_of_run_are_those_of_doctor(environ: dict[str, str], tmp_path: Path) -> None:
    write_nvidia_smi(tmp_path, Card("GPU-aaaa"), Card("GPU-bbbb"))
    there = environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "KEYE_DEVICE": "auto"}
    for asked, found in (
        ("1", "1 GPU: GPU-bbbb"),
        ("GPU-b", "1 GPU: GPU-bbbb"),
        ("0,4", "--gpus: no such GPU: 4. nvidia-smi lists 0 (GPU-aaaa), 1 (GPU-bbbb)."),
    ):
        answer = CliRunner().invoke(app, ["doctor", "--json", "--gpus", asked], env=there, catch_exceptions=False)
        assert found in [finding["found"] for finding in map(json.loads, answer.stdout.splitlines())]
        assert answer.exit_code == ExitCode.PREFLIGHT_FAILED
