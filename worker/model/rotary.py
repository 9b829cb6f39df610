"""Rotary embeddings: angles from positions, and how angles turn queries and keys. `positions.py` has the positions."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from keye.worker.model.configuration_keye import KeyeConfig
from keye.worker.model.device import send

VISION_ROPE_THETA = 10_000.0


@lru_cache(maxsize=16)
def _inverse_frequencies(dim: int, theta: float, device: torch.device) -> Tensor:
    # Not a buffer: casting the model to bfloat16 would cast it as well, and at position 30000 that is a wrong angle.
    return theta ** -(torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)


@lru_cache(maxsize=16)
def _section_rows(section: tuple[int, ...], device: torch.device) -> Tensor:
    rows = [row for row, length in enumerate(section) for _ in range(length)]
    return send(np.array(rows), device)


def text_rotation(position_ids: Tensor, config: KeyeConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines [B, L, 1, head_dim] for positions [3, B, L] (temporal, height, width).

    The head_dim/2 frequencies are cut into three runs of the lengths `mrope_section`; run s follows position row s.
    """
    rope, device = config.rope_parameters, position_ids.device
    positions = position_ids[_section_rows(tuple(rope["mrope_section"]), device)].movedim(0, -1).float()
    cos, sin = _for_halves(positions * _inverse_frequencies(config.head_dim, rope["rope_theta"], device))
    return cos.to(dtype).unsqueeze(2), sin.to(dtype).unsqueeze(2)


def vision_rotation(grids: Sequence[Sequence[int]], head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines float32 [patches, 1, head_dim] for packed items of (t, h, w) patches in raster order.

    The first half of the angles follows the row of a patch, the second half its column; both start again in each frame.
    """
    frequencies = _inverse_frequencies(head_dim // 2, VISION_ROPE_THETA, device)
    parts: list[tuple[Tensor, Tensor]] = []
    for (rows, columns), run in groupby(grids, key=lambda grid: (grid[1], grid[2])):
        row_angles = torch.arange(rows, device=device).unsqueeze(1) * frequencies
        column_angles = torch.arange(columns, device=device).unsqueeze(1) * frequencies
        cos, sin = _for_halves(
            torch.cat((row_angles.repeat_interleave(columns, dim=0), column_angles.repeat(rows, 1)), dim=-1)
        )
        num_frames = sum(t for t, _, _ in run)
        parts.append((cos.repeat(num_frames, 1), sin.repeat(num_frames, 1)))
    all_cos, all_sin = zip(*parts, strict=True)
    return torch.cat(all_cos).unsqueeze(1), torch.cat(all_sin).unsqueeze(1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns pairs (j, j + d/2) of the last dimension by their angle; `cos` and signed `sin` must broadcast to `x`.

    Three kernels: at small batches there are more of them than there is work.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def _for_halves(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [..., 2n] of angles [..., n]; the sines of the first half are negative, as `rotate` wants."""
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
