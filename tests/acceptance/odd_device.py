"""Included in a worker, this has its device seem one with faster forms of attention, none of which runs."""

from typing import Any

from keye.worker.model import attention_choice, cuda_attention


def find_no_compiler() -> Any:
    raise RuntimeError("Failed to find C compiler")


attention_choice.has_packed_kernels = lambda *_: True
cuda_attention._compiled_flex_attention = find_no_compiler  # type: ignore[assignment]
