"""Which GPUs get a worker each."""

from pathlib import Path

import pytest

from keye.worker.daemon.supervisor import visible_gpus


@pytest.fixture
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose driver lists two cards."""
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho GPU-aaaa\necho GPU-bbbb\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")


@pytest.mark.usefixtures("two_gpus")
def test_every_gpu_the_driver_lists_gets_a_worker() -> None:
    assert visible_gpus("auto", {}) == ["GPU-aaaa", "GPU-bbbb"]


@pytest.mark.usefixtures("two_gpus")
def test_the_operators_own_choice_is_kept() -> None:
    assert visible_gpus("auto", {"CUDA_VISIBLE_DEVICES": "1, GPU-cccc"}) == ["1", "GPU-cccc"]


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(("chosen", "expected"), [("", []), ("-1", []), ("0,-1,1", ["0"])])
def test_an_empty_choice_hides_all_and_a_negative_one_ends_the_list(chosen: str, expected: list[str]) -> None:
    assert visible_gpus("auto", {"CUDA_VISIBLE_DEVICES": chosen}) == expected


@pytest.mark.usefixtures("two_gpus")
def test_the_cpu_is_used_when_asked_for() -> None:
    assert visible_gpus("cpu", {"CUDA_VISIBLE_DEVICES": "0"}) == []


def test_a_machine_without_a_driver_has_no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visible_gpus("auto", {}) == []
