"""Which GPUs get a worker each."""

from collections.abc import Callable
from pathlib import Path

import pytest

from keye.worker.daemon.supervisor import visible_gpus

Driver = Callable[..., None]


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Driver:
    """Puts an nvidia-smi on PATH that knows these cards: UUID, MIG mode, and the UUIDs of their MIG instances."""

    def write(*cards: tuple[str, str, list[str]]) -> None:
        modes = [f"{card}, {mode}" for card, mode, _ in cards]
        listed = []
        for number, (card, _, instances) in enumerate(cards):
            listed.append(f"GPU {number}: NVIDIA A100-SXM4-40GB (UUID: {card})")
            listed += [f"  MIG 3g.20gb     Device  {place}: (UUID: {uuid})" for place, uuid in enumerate(instances)]
        script = ["#!/bin/sh", "case $1 in", *_case("-L", listed), *_case("--query-gpu=uuid,mig.mode.current", modes)]
        command = tmp_path / "nvidia-smi"
        command.write_text("\n".join([*script, "*) exit 2 ;;", "esac", ""]))
        command.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    return write


def _case(argument: str, answer: list[str]) -> list[str]:
    return [f"{argument})", *(f"echo '{line}'" for line in answer), ";;"]


@pytest.fixture
def two_gpus(driver: Driver) -> None:
    """A machine whose driver lists two cards, the first too old to be cut into instances."""
    driver(("GPU-aaaa", "[N/A]", []), ("GPU-bbbb", "Disabled", []))


@pytest.mark.usefixtures("two_gpus")
def test_every_gpu_the_driver_lists_gets_a_worker() -> None:
    assert visible_gpus("auto", {}) == ["GPU-aaaa", "GPU-bbbb"]


def test_each_mig_instance_gets_a_worker_and_the_card_it_was_cut_from_does_not(driver: Driver) -> None:
    driver(
        ("GPU-aaaa", "Disabled", []),
        ("GPU-bbbb", "Enabled", ["MIG-1111", "MIG-2222"]),
        ("GPU-cccc", "Enabled", ["MIG-GPU-cccc/3/0"]),
    )
    assert visible_gpus("auto", {}) == ["GPU-aaaa", "MIG-1111", "MIG-2222", "MIG-GPU-cccc/3/0"]


def test_a_card_with_mig_enabled_and_no_instance_gets_no_worker(driver: Driver) -> None:
    driver(("GPU-aaaa", "Enabled", []), ("GPU-bbbb", "Disabled", []))
    assert visible_gpus("auto", {}) == ["GPU-bbbb"]


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
