"""Included in a worker, this has its device seem one with faster forms of attention, wrong or failing."""

from typing import Any

from keye.worker.model import attention_choice, cuda_attention, item_attention
from tests.support.varlen_on_paper import leaves_split_rows_unwritten, varlen_on_paper


def find_no_compiler() -> Any:
    raise RuntimeError("Failed to find C compiler")


attention_choice.has_packed_kernels = lambda *_: True
attention_choice.HAS_BLOCK_TABLES = True
cuda_attention.varlen_attn = leaves_split_rows_unwritten  # type: ignore[assignment]
cuda_attention._compiled_flex_attention = find_no_compiler  # type: ignore[assignment]
item_attention.varlen_attn = varlen_on_paper  # type: ignore[assignment]
