"""Attention inside each item, in every form a device may choose, against attention written out item by item."""

import pytest
import torch
from torch import Tensor

from keye.worker.model.item_attention import EqualItems, ItemForm, VarlenItems

HEADS, HEAD_DIM = 4, 8

BACKENDS = [
    pytest.param(EqualItems(), "cpu", torch.float32, 1e-5, id="cpu"),
    pytest.param(
        VarlenItems(),
        "cuda",
        torch.bfloat16,
        2e-2,
        id="cuda",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="the packed kernel needs a CUDA device"),
    ),
]


def attend_item_by_item(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    outputs = []
    for q, k, v in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True):
        weights = (torch.einsum("qhd,khd->hqk", q, k) * HEAD_DIM**-0.5).softmax(dim=-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(outputs)


@pytest.mark.holds(
    "docs/model.md#vision-tower",
    "attention never crosses a border, on any device",
    "elsewhere items of equal length go through one scaled-dot-product call",
)
@pytest.mark.parametrize(("form", "device", "dtype", "accepted"), BACKENDS)
@pytest.mark.parametrize(
    "lengths", [[6], [6, 6, 6], [4, 9], [12, 4, 12, 9, 4, 1]], ids=["one", "equal", "two sizes", "mixed"]
)
def test_items_attend_to_themselves_alone(
    lengths: list[int], form: ItemForm, device: str, dtype: torch.dtype, accepted: float
) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, sum(lengths), HEADS, HEAD_DIM)
    attend = form.attention(lengths, torch.device(device))
    ours = attend(*(x.to(device, dtype) for x in (query, key, value))).float().cpu()
    torch.testing.assert_close(ours, attend_item_by_item(query, key, value, lengths), rtol=0, atol=accepted)


@pytest.mark.holds(
    "docs/model.md#what-the-released-code-gets-wrong-and-this-does-not",
    "Items see each other without flash-attention: here never.",
)
@pytest.mark.parametrize(("form", "device", "dtype", "accepted"), BACKENDS)
def test_one_item_does_not_change_when_another_does(
    form: ItemForm, device: str, dtype: torch.dtype, accepted: float
) -> None:
    torch.manual_seed(0)
    first, other, another = (torch.randn(n, HEADS, HEAD_DIM, device=device, dtype=dtype) for n in (7, 5, 5))
    attend = form.attention([7, 5], torch.device(device))
    beside_other, beside_another = (attend(*[torch.cat([first, x])] * 3)[:7] for x in (other, another))
    assert torch.equal(beside_other, beside_another)
