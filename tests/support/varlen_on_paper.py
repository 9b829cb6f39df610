"""What the documentation of `varlen_attn` promises, which itself runs on CUDA only."""

from typing import Any

import torch
from torch import Tensor

from keye.worker.model.attention_choice import attend_on_paper


def varlen_on_paper(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    assert enable_gqa or query.shape[1] == key.shape[-2]
    assert scale in (None, query.shape[-1] ** -0.5)
    outputs = []
    for number in range(len(cu_seq_q) - 1):
        own = query[cu_seq_q[number] : cu_seq_q[number + 1]]
        if block_table is None or seqused_k is None:
            keys, values = (x[cu_seq_k[number] : cu_seq_k[number + 1]] for x in (key, value))
        else:
            used = int(seqused_k[number])
            keys, values = (x[block_table[number]].flatten(0, 1)[:used] for x in (key, value))
        assert len(own) <= max_q
        assert len(keys) <= max_k
        left, right = window_size
        is_causal = (left, right) == (-1, 0)
        assert is_causal or (min(left, right) >= len(keys) or (left, right) == (-1, -1))
        outputs.append(attend_on_paper(own, keys, values, is_causal=is_causal))
    return torch.cat(outputs).to(query.dtype)


def leaves_split_rows_unwritten(*args: Any, **kwargs: Any) -> Tensor:
    """For several queries of several sequences over blocks; it splits whatever it is told."""
    output, borders, max_queries = varlen_on_paper(*args, **kwargs), args[3], args[5]
    if kwargs.get("block_table") is not None and max_queries > 1:
        output[borders[1] :] = 0
    return output
