"""The form of attention a device gets, with faults planted in the libraries below. CUDA's forms run as documented."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from keye.worker.model import attention_choice, cuda_attention, item_attention, paged_attention
from keye.worker.model.attention_choice import Attention, NoRightAttention, choose_attention
from keye.worker.model.configuration_keye import KeyeConfig, KeyeVisionConfig
from tests.support.varlen_on_paper import leaves_split_rows_unwritten, varlen_on_paper

VARLEN, FLEX, PLAIN = "varlen_attn over block tables", "flex_attention over blocks", "scaled_dot_product_attention"


def choose(dtype: torch.dtype = torch.bfloat16) -> Attention:
    config = KeyeConfig(
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rope_parameters={"mrope_section": [2, 3, 3]},
        max_position_embeddings=4096,
        vision_config=KeyeVisionConfig(hidden_size=36, num_attention_heads=2),
    )
    return choose_attention(config, dtype, torch.device("cpu"))


@pytest.fixture
def pretended_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], None]]:
    """All forms may run; to be called with what takes the place of `varlen_attn`."""
    monkeypatch.setattr(attention_choice, "has_packed_kernels", lambda *_: True)
    monkeypatch.setattr(attention_choice, "HAS_BLOCK_TABLES", True)

    def set_kernel(kernel: Any) -> None:
        for module in (cuda_attention, item_attention):
            monkeypatch.setattr(module, "varlen_attn", kernel)

    set_kernel(varlen_on_paper)
    with torch.compiler.set_stance("force_eager"):
        yield set_kernel


def test_the_cpu_attends_in_the_form_that_runs_everywhere() -> None:
    assert choose(torch.float32).name == f"{PLAIN} over gathered blocks; images: {PLAIN}"
    assert choose(torch.float32).refused == ()


@pytest.mark.usefixtures("pretended_cuda")
def test_the_fastest_form_is_taken_where_it_is_right() -> None:
    assert choose().name == f"{VARLEN}; images: varlen_attn"
    assert choose().refused == ()


def is_off_by_a_row(*args: Any, **kwargs: Any) -> Tensor:
    return varlen_on_paper(*args, **kwargs).roll(1, dims=0)


def gives_what_is_no_number(*args: Any, **kwargs: Any) -> Tensor:
    return torch.full_like(args[0], torch.nan)


def sees_a_key_too_many(*args: Any, **kwargs: Any) -> Tensor:
    if "seqused_k" in kwargs:
        kwargs["seqused_k"] = kwargs["seqused_k"] + 1
    return varlen_on_paper(*args[:6], args[6] + 1, **kwargs)


@pytest.mark.holds("docs/model.md#proof", "a row left out, or one too many, is off by 0.1 and more")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    ("kernel", "chosen", "said"),
    [
        (leaves_split_rows_unwritten, f"{FLEX}, varlen_attn for prompts; images: varlen_attn", "is wrong here: off by"),
        (sees_a_key_too_many, f"{FLEX}, varlen_attn for prompts; images: varlen_attn", "is wrong here: off by"),
        (is_off_by_a_row, f"{PLAIN} over gathered blocks; images: {PLAIN}", "is wrong here: off by"),
        (gives_what_is_no_number, f"{PLAIN} over gathered blocks; images: {PLAIN}", "off by up to nan"),
        (lambda query: query, f"{PLAIN} over gathered blocks; images: {PLAIN}", "does not run here: TypeError: "),
    ],
)
def test_a_form_that_fails_or_differs_is_named_and_the_next_is_taken(
    pretended_cuda: Callable[[Any], None],
    kernel: Any,
    chosen: str,
    said: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pretended_cuda(kernel)
    attention = choose()
    assert attention.name == chosen
    assert attention.refused[0].startswith(f"attention by {VARLEN} ")
    assert said in attention.refused[0]
    assert all(sentence in caplog.text for sentence in attention.refused)


def test_a_kernel_that_cannot_be_compiled_is_passed_over(
    pretended_cuda: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_it() -> Any:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(cuda_attention, "_compiled_flex_attention", compile_it)
    monkeypatch.setattr(attention_choice, "HAS_BLOCK_TABLES", False)
    attention = choose()
    assert attention.name == f"{PLAIN} over gathered blocks; images: varlen_attn"
    assert "flex_attention over blocks, varlen_attn for prompts does not run here" in attention.refused[0]
    assert "Failed to find C compiler" in attention.refused[0]


def without_its_scale(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **options: Any) -> Tensor:
    return scaled_dot_product_attention(2 * query, key, value, attn_mask=attn_mask, **options)


@pytest.mark.parametrize(
    ("kernel", "said"), [(without_its_scale, "is wrong here: off by"), (lambda query: query, "TypeError")]
)
def test_a_device_on_which_no_form_is_right_is_not_used(
    monkeypatch: pytest.MonkeyPatch, kernel: Any, said: str
) -> None:
    monkeypatch.setattr(paged_attention, "scaled_dot_product_attention", kernel)
    with pytest.raises(NoRightAttention, match=said):
        choose(torch.float32)


def test_a_device_that_is_lost_is_not_taken_for_a_form_that_fails(pretended_cuda: Callable[[Any], None]) -> None:
    def lose_it(*_: Any, **__: Any) -> Tensor:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    pretended_cuda(lose_it)
    with pytest.raises(torch.AcceleratorError):
        choose()
