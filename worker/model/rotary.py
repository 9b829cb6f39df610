"""Rotary embeddings: angles from positions, and how angles turn queries and keys. `positions.py` has the positions."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

VISION_ROPE_THETA = 10_000.0


@lru_cache(maxsize=16)
def _inverse_frequencies(dim: int, theta: float, device: torch.device) -> Tensor:
    # Not a buffer: casting the model to bfloat16 would cast it as well, and at position 30000 that is a wrong angle.
    return theta ** -(torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)


@lru_cache(maxsize=16)
def _section_rows(section: tuple[int, ...], device: torch.device) -> Tensor:
    rows = [row for row, length in enumerate(section) for _ in range(length)]
    return torch.tensor(rows, device=device)


def text_rotation(
    position_ids: Tensor, head_dim: int, theta: float, section: Sequence[int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, L, head_dim] for positions [3, B, L] (temporal, height, width).

    The head_dim/2 frequencies are cut into three runs of the lengths `section`; run s follows position row s.
    """
    device = position_ids.device
    positions = position_ids[_section_rows(tuple(section), device)].movedim(0, -1).float()
    angles = positions * _inverse_frequencies(head_dim, theta, device)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def vision_rotation(rows: int, columns: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines float32 [rows * columns, head_dim] for a grid of patches in raster order.

    The first half of the angles follows the row of a patch, the second half its column.
    """
    frequencies = _inverse_frequencies(head_dim // 2, VISION_ROPE_THETA, device)
    row_angles = torch.arange(rows, device=device).unsqueeze(1) * frequencies
    column_angles = torch.arange(columns, device=device).unsqueeze(1) * frequencies
    angles = torch.cat(
        (row_angles.repeat_interleave(columns, dim=0), column_angles.repeat(rows, 1)),
        dim=-1,
    ).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns pairs (j, j + d/2) of the last dimension by their angle; `cos` and `sin` must broadcast to `x`."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
