"""Which GPUs get a worker each."""

from collections.abc import Callable
from pathlib import Path

import pytest

from keye.worker.daemon.gpus import WrongGpus, visible_gpus
from tests.support.pretended_driver import Card, write_nvidia_smi

Driver = Callable[..., None]


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Driver:
    """Puts an nvidia-smi on PATH that knows these cards."""

    def write(*cards: Card) -> None:
        write_nvidia_smi(tmp_path, *cards)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    return write


@pytest.fixture
def two_gpus(driver: Driver) -> None:
    """A machine whose driver lists two cards, the first too old to be cut into instances."""
    driver(Card("GPU-aaaa", "[N/A]"), Card("GPU-bbbb"))


@pytest.fixture
def cut_gpus(driver: Driver) -> None:
    """Four cards: a whole one, one in two instances, one that has none yet, and another whole one."""
    driver(
        Card("GPU-aaaa"),
        Card("GPU-bbbb", "Enabled", ["MIG-1111", "MIG-2222"]),
        Card("GPU-cccc", "Enabled"),
        Card("GPU-aadd"),
    )


@pytest.mark.holds("README.md#keye-worker", "One worker process per GPU")
@pytest.mark.holds("docs/deploy.md#systemd", "It takes every GPU of the host")
@pytest.mark.holds("docs/operations.md#which-gpus-are-used", "One process for each GPU that `nvidia-smi -L` lists")
@pytest.mark.usefixtures("two_gpus")
def test_every_gpu_the_driver_lists_gets_a_worker() -> None:
    assert visible_gpus("auto", {}) == ["GPU-aaaa", "GPU-bbbb"]


@pytest.mark.holds("docs/operations.md#which-gpus-are-used", "A card cut by MIG counts as its instances")
def test_each_mig_instance_gets_a_worker_and_the_card_it_was_cut_from_does_not(driver: Driver) -> None:
    driver(
        Card("GPU-aaaa"),
        Card("GPU-bbbb", "Enabled", ["MIG-1111", "MIG-2222"]),
        Card("GPU-cccc", "Enabled", ["MIG-GPU-cccc/3/0"]),
    )
    assert visible_gpus("auto", {}) == ["GPU-aaaa", "MIG-1111", "MIG-2222", "MIG-GPU-cccc/3/0"]


@pytest.mark.holds("docs/operations.md#which-gpus-are-used", "as none where it has MIG enabled and no instance")
def test_a_card_with_mig_enabled_and_no_instance_gets_no_worker(driver: Driver) -> None:
    driver(Card("GPU-aaaa", "Enabled"), Card("GPU-bbbb"))
    assert visible_gpus("auto", {}) == ["GPU-bbbb"]


@pytest.mark.holds("docs/deploy.md#systemd", "those of `CUDA_VISIBLE_DEVICES` in the file")
@pytest.mark.holds(
    "docs/alerts.md#keyeworkergivenup",
    "`keye-worker doctor` with `CUDA_VISIBLE_DEVICES` set to that GPU tries it alone.",
)
@pytest.mark.holds("docs/operations.md#which-gpus-are-used", "for each in `CUDA_VISIBLE_DEVICES` where that is set")
@pytest.mark.usefixtures("two_gpus")
def test_the_operators_own_choice_is_kept() -> None:
    assert visible_gpus("auto", {"CUDA_VISIBLE_DEVICES": "1, GPU-cccc"}) == ["1", "GPU-cccc"]


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(("chosen", "expected"), [("", []), ("-1", []), ("0,-1,1", ["0"])])
def test_an_empty_choice_hides_all_and_a_negative_one_ends_the_list(chosen: str, expected: list[str]) -> None:
    assert visible_gpus("auto", {"CUDA_VISIBLE_DEVICES": chosen}) == expected


@pytest.mark.holds("docs/operations.md#which-gpus-are-used", "or with `KEYE_DEVICE=cpu`, one process runs on the CPU")
@pytest.mark.usefixtures("two_gpus")
def test_the_cpu_is_used_when_asked_for() -> None:
    assert visible_gpus("cpu", {"CUDA_VISIBLE_DEVICES": "0"}) == []


@pytest.mark.holds(
    "docs/operations.md#which-gpus-are-used",
    "Without a GPU, or with `KEYE_DEVICE=cpu`, one process runs on the CPU",
    "every one, and a fault where there is none",
)
def test_a_machine_without_a_driver_has_no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visible_gpus("auto", {}) == []
    with pytest.raises(WrongGpus, match="nvidia-smi lists none"):
        visible_gpus("auto", {}, "all")


@pytest.mark.holds(
    "docs/operations.md#which-gpus-are-used",
    "as nvidia-smi numbers them; a card cut by MIG stands for all its instances",
    "`--gpus` takes the place of `CUDA_VISIBLE_DEVICES`",
)
@pytest.mark.usefixtures("cut_gpus")
@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("all", ["GPU-aaaa", "MIG-1111", "MIG-2222", "GPU-aadd"]),
        ("3, 0", ["GPU-aadd", "GPU-aaaa"]),
        ("1", ["MIG-1111", "MIG-2222"]),
        ("GPU-bbbb", ["MIG-1111", "MIG-2222"]),
        ("MIG-2222,0,GPU-aad", ["MIG-2222", "GPU-aaaa", "GPU-aadd"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_gpus_that_are_named_get_a_worker_each_whatever_cuda_visible_devices_is(
    asked: str, expected: list[str]
) -> None:
    assert visible_gpus("auto", {"CUDA_VISIBLE_DEVICES": "1"}, asked) == expected


@pytest.mark.holds("docs/operations.md#which-gpus-are-used", "what is not there, or named twice")
@pytest.mark.usefixtures("cut_gpus")
@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("7", "no such GPU: 7"),
        ("-1", "no such GPU: -1"),
        ("", "no such GPU: (nothing)"),
        ("0,,3", "no such GPU: (nothing)"),
        ("aaaa", "no such GPU: aaaa"),
        ("GPU-ffff,MIG-3", "no such GPU: GPU-ffff; no such GPU: MIG-3"),
        ("2", "GPU 2 has MIG enabled and no instance"),
        ("GPU-aa", "GPU-aa may be any of GPU-aaaa, GPU-aadd"),
        ("0,GPU-aaaa", "GPU-aaaa names GPU-aaaa, which 0 has named"),
        ("MIG-1111,1", "1 names MIG-1111, which MIG-1111 has named"),
    ],
)
def test_a_gpu_that_is_not_there_or_named_twice_is_told_with_those_there_are(asked: str, told: str) -> None:
    with pytest.raises(WrongGpus) as error:
        visible_gpus("auto", {}, asked)
    assert told in str(error.value)
    assert "nvidia-smi lists 0 (GPU-aaaa), 1 (GPU-bbbb, MIG-1111, MIG-2222), 2 (GPU-cccc), 3" in str(error.value)


def test_gpus_and_the_cpu_cannot_both_be_asked_for() -> None:
    with pytest.raises(WrongGpus, match="--gpus is all and KEYE_DEVICE is cpu"):
        visible_gpus("cpu", {}, "all")
