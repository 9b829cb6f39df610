"""Chooses how paged attention runs on a device, once at start."""

import torch

from worker.model.flex_decoding import FlexForm
from worker.model.gathered_attention import GatheredForm
from worker.model.paged_attention import AttentionForm
from worker.model.varlen_attention import HAS_BLOCK_TABLES, VarlenForm

# The packed kernels need this much of a GPU (Ampere).
_LEAST_CAPABILITY = (8, 0)


def choose_attention(device: torch.device, dtype: torch.dtype, max_tokens: int) -> AttentionForm:
    """The fastest form that runs there, for sequences of at most `max_tokens`."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return GatheredForm()
    if torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        return GatheredForm()
    return VarlenForm(max_tokens) if HAS_BLOCK_TABLES else FlexForm(max_tokens)
