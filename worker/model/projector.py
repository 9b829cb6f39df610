"""The projector: four neighbouring patch features to one row of the text model's width."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from keye.worker.model.configuration_keye import KeyeConfig

NORM_EPS = 1e-5  # of this norm alone; no field of the config holds it


class Projector(nn.Module):
    def __init__(self, config: KeyeConfig) -> None:
        super().__init__()
        vision = config.vision_config
        merged = vision.hidden_size * vision.spatial_merge_size**2
        self.merge_size = vision.spatial_merge_size
        self.normalises_merged_patches = config.normalises_merged_patches
        self.pre_norm = nn.LayerNorm(merged if self.normalises_merged_patches else vision.hidden_size, eps=NORM_EPS)
        self.linear_1 = nn.Linear(merged, merged)
        self.activation = nn.GELU()  # the exact form; the tower uses the tanh form
        self.linear_2 = nn.Linear(merged, config.hidden_size)

    def forward(self, features: Tensor, grids: Sequence[Sequence[int]]) -> Tensor:
        """[patches, D] to [patches / 4, H], in raster order of the merged grid, frame by frame."""
        if self.normalises_merged_patches:
            merged = self.pre_norm(self.merge(features, grids))
        else:
            merged = self.merge(self.pre_norm(features), grids)
        return self.linear_2(self.activation(self.linear_1(merged)))

    def merge(self, features: Tensor, grids: Sequence[Sequence[int]]) -> Tensor:
        """Joins each 2x2 block, row by row inside the block, to one vector of 4D."""
        size = self.merge_size
        items = features.split([t * h * w for t, h, w in grids])
        return torch.cat(
            [
                item.view(t, h // size, size, w // size, size, -1).transpose(2, 3).reshape(t * h * w // size**2, -1)
                for item, (t, h, w) in zip(items, grids, strict=True)
            ]
        )
