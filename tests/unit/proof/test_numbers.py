"""The proof of a machine's numbers: what it says where all is right, and that it names faults planted below it."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from keye.config.settings import Settings
from keye.worker.daemon.findings import Severity
from keye.worker.daemon.trials import check_numbers
from keye.worker.loading.served_model import load_served_model
from keye.worker.model import item_attention, paged_attention, rotary, vision_tower
from keye.worker.proof.golden_case import GENERATIONS
from keye.worker.proof.numbers import NumbersDiffer, prove_numbers

CPU = torch.device("cpu")


@pytest.mark.holds("docs/model.md#proof", "In half precision logits may be off by 8 steps")
@pytest.mark.holds(
    "docs/operations.md#are-its-numbers-right-on-this-machine",
    "They go through processor and engine on the installed packages",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_of_both_generations_are_proven_in_each_precision(dtype: torch.dtype) -> None:
    said = prove_numbers(GENERATIONS.values(), dtype, CPU)
    assert said.startswith("preview and v1_5 as the reference: pixels, ids, positions, 24 tokens of each case")
    for name in {"float32", str(dtype).removeprefix("torch.")}:
        assert f"{name} logits off by " in said


@pytest.mark.holds(
    "docs/operations.md#are-its-numbers-right-on-this-machine",
    "two tiny checkpoints in the released layout, and four cases of each",
)
def test_proof_is_small_enough_to_ship() -> None:
    folder = Path(next(iter(GENERATIONS.values()))).parent
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 4e6
    assert [len(list(generation.glob("cases/*.npz"))) for generation in GENERATIONS.values()] == [4, 4]


def resamples_bilinearly(resize: Callable[..., Any]) -> Callable[..., Any]:
    return lambda picture, size, resample=None: resize(picture, size, PIL.Image.Resampling.BILINEAR)


def takes_no_third(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda first, second: function(first, second)


def swaps_rows_and_columns(rotation: Callable[..., Any]) -> Callable[..., Any]:
    return lambda grids, *others: rotation([(t, w, h) for t, h, w in grids], *others)


def swaps_height_and_width(rows: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda section, device: rows((section[0], section[2], section[1]), device).clamp(max=1)


def is_off_by_a_row(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *tensors, **options: attend(*tensors, **options).roll(1, dims=-2)


FAULTS = {
    "wrong-resampling": (PIL.Image.Image, "resize", resamples_bilinearly, r"preview: pixel_values of \w+ are off by"),
    "swapped-axis-of-images": (vision_tower, "vision_rotation", swaps_rows_and_columns, "logits of .* are off by"),
    "swapped-axis-of-text": (rotary, "_section_rows", swaps_height_and_width, "logits of .* are off by"),
    "attention-off-by-a-row": (
        paged_attention,
        "scaled_dot_product_attention",
        is_off_by_a_row,
        "attention by scaled_dot_product_attention over gathered blocks is wrong here: off by",
    ),
    "image-attention-off-by-a-row": (
        item_attention,
        "scaled_dot_product_attention",
        is_off_by_a_row,
        "attention by scaled_dot_product_attention is wrong here: off by",
    ),
    "argument-renamed-in-pillow": (PIL.Image.Image, "resize", takes_no_third, "preview: TypeError"),
    "argument-renamed-in-torch": (functional, "interpolate", takes_no_third, "(preview in float32|v1_5): .*TypeError"),
    "argument-renamed-in-attention": (
        paged_attention,
        "scaled_dot_product_attention",
        takes_no_third,
        "over gathered blocks does not run here: TypeError",
    ),
}


@pytest.mark.holds("docs/model.md#proof", "`keye-worker doctor` all eight")
@pytest.mark.holds(
    "docs/operations.md#are-its-numbers-right-on-this-machine",
    "So every worker proves its numbers before it takes a job",
    "A number that is off stops the start (12), named.",
)
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_named_by_the_doctor_and_stops_a_start(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of, name, plant, says = FAULTS[fault]
    monkeypatch.setattr(of, name, plant(getattr(of, name)))
    settings = Settings(model_path=GENERATIONS["Keye"] / "checkpoint", device="cpu")
    finding = check_numbers(settings)
    assert finding.severity is Severity.FAULT
    assert re.search(says, finding.found)
    with pytest.raises(NumbersDiffer, match=says):
        load_served_model(settings)
