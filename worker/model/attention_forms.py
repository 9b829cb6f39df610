"""Chooses how paged attention runs on a device, once at start."""

import torch

from keye.worker.model.device import has_packed_kernels
from keye.worker.model.flex_decoding import FlexForm
from keye.worker.model.gathered_attention import GatheredForm
from keye.worker.model.paged_attention import AttentionForm
from keye.worker.model.varlen_attention import HAS_BLOCK_TABLES, VarlenForm


def choose_attention(device: torch.device, dtype: torch.dtype, head_dim: int, max_tokens: int) -> AttentionForm:
    """The fastest form that runs there, for sequences of at most `max_tokens`."""
    if not has_packed_kernels(device, dtype, head_dim):
        return GatheredForm()
    return VarlenForm(max_tokens) if HAS_BLOCK_TABLES else FlexForm(max_tokens)
