"""What the model sees with: the tower gives each packed patch a feature vector, the projector makes rows of four.

Attention never leaves an item: packed patches of many images and frames, no padding.
"""

from collections.abc import Callable, Iterator, Sequence
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from keye.worker.model.configuration_keye import KeyeConfig, KeyeVisionConfig
from keye.worker.model.item_attention import AttendItems, EqualItems, ItemForm
from keye.worker.model.rotary import rotate, vision_rotation

MAX_PATCHES = 16_384
"""What goes through the tower at once: more than the images of a step have, and less than a long video."""


def at_once(grids: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """The items in groups of at most `MAX_PATCHES` patches, an item alone where it has more."""
    group: list[Sequence[int]] = []
    num_patches = 0
    for grid in grids:
        num_patches += prod(grid)
        if group and num_patches > MAX_PATCHES:
            yield group
            group, num_patches = [], prod(grid)
        group.append(grid)
    yield group


def in_parts(compute: Callable[..., tuple[Tensor, ...]], *rows: Tensor) -> tuple[Tensor, ...]:
    """`compute(*rows)`, whose rows do not see each other: for one large item a part at a time.

    So that of what lies between its inputs and its outputs there is never more than a part.
    """
    num_rows = len(rows[0])
    if num_rows <= MAX_PATCHES:
        return compute(*rows)
    whole: list[Tensor] = []
    start = 0
    for part in zip(*(x.split(MAX_PATCHES // 8) for x in rows), strict=True):
        stop = start + len(part[0])
        computed = compute(*part)
        whole = whole or [x.new_empty(num_rows, *x.shape[1:]) for x in computed]
        for into, x in zip(whole, computed, strict=True):
            into[start:stop] = x
        start = stop
    return tuple(whole)


class VisionEmbeddings(nn.Module):
    """A linear map of each patch plus a learned position, interpolated from a square table to the item's grid."""

    def __init__(self, config: KeyeVisionConfig) -> None:
        super().__init__()
        self.table_side = config.image_size // config.patch_size
        self.normalise: Callable[[Tensor], Tensor] | None = None
        """The checkpoint's way from patches of 8 bits to float32; who loads one sets it."""
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.position_embedding = nn.Embedding(self.table_side**2, config.hidden_size)

    def forward(self, pixel_values: Tensor, grids: Sequence[Sequence[int]]) -> Tensor:
        """[patches, 3, p, p], on any device, to [patches, D]: uint8 to be normalised, or floats that are so already.

        Raises `ValueError` for uint8 where nobody has said how to normalise it.
        """
        (patches,) = in_parts(self._embed, pixel_values, self._position_rows(grids))
        return patches

    def _embed(self, pixel_values: Tensor, position_rows: Tensor) -> tuple[Tensor]:
        # A convolution whose stride is its kernel is one matrix product, and the product is faster on every device.
        kernel = self.patch_embedding
        pixels = pixel_values.to(kernel.weight.device)
        if pixels.dtype == torch.uint8:
            if self.normalise is None:
                raise ValueError("patches are uint8, and the model has no `normalise`: load it with `load_model`")
            pixels = self.normalise(pixels)
        pixels = pixels.to(kernel.weight.dtype)
        return (F.linear(pixels.flatten(1), kernel.weight.flatten(1), kernel.bias) + position_rows,)

    def _position_rows(self, grids: Sequence[Sequence[int]]) -> Tensor:
        dtype = self.position_embedding.weight.dtype
        table = self.position_embedding.weight.float().T.unflatten(1, (self.table_side, self.table_side)).unsqueeze(0)
        rows = {
            (h, w): F.interpolate(table, size=(h, w), mode="bilinear", align_corners=False)[0].flatten(1).T.to(dtype)
            for h, w in {(h, w) for _, h, w in grids}
        }
        return torch.cat([rows[h, w].repeat(t, 1) for t, h, w in grids])


class VisionAttention(nn.Module):
    def __init__(self, config: KeyeVisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def heads(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [patches, heads, head_dim] of [patches, D]."""
        heads = (self.num_heads, -1)
        query = self.q_proj(hidden).unflatten(-1, heads)
        key = self.k_proj(hidden).unflatten(-1, heads)
        value = self.v_proj(hidden).unflatten(-1, heads)
        # The model was trained with this rotation in float32 whatever its weights are in.
        query = rotate(query.float(), cos, sin).to(value.dtype)
        key = rotate(key.float(), cos, sin).to(value.dtype)
        return query, key, value


class VisionMLP(nn.Module):
    def __init__(self, config: KeyeVisionConfig) -> None:
        super().__init__()
        self.activation = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(hidden)))


class VisionEncoderLayer(nn.Module):
    def __init__(self, config: KeyeVisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = VisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VisionMLP(config)

    def forward(self, hidden: Tensor, rotation: tuple[Tensor, Tensor], attend: AttendItems) -> Tensor:
        """Only attention needs an item whole: its queries, keys, values and outputs, beside `hidden` [patches, D]."""
        query, key, value = in_parts(self._heads, hidden, *rotation)
        attended = attend(query, key, value)
        del query, key, value
        (hidden,) = in_parts(self._after_attention, hidden, attended)
        return hidden

    def _heads(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        return self.self_attn.heads(self.layer_norm1(hidden), cos, sin)

    def _after_attention(self, hidden: Tensor, attended: Tensor) -> tuple[Tensor]:
        hidden = hidden + self.self_attn.out_proj(attended.flatten(1))
        return (hidden + self.mlp(self.layer_norm2(hidden)),)


class VisionEncoder(nn.Module):
    def __init__(self, config: KeyeVisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionEncoderLayer(config) for _ in range(config.num_hidden_layers))


class VisionTransformer(nn.Module):
    def __init__(self, config: KeyeVisionConfig) -> None:
        super().__init__()
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.item_form: ItemForm = EqualItems()
        """Runs everywhere; an engine sets the fastest that is right on its device."""
        self.embeddings = VisionEmbeddings(config)
        self.encoder = VisionEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values: Tensor, grids: Sequence[Sequence[int]]) -> Tensor:
        """Features [patches, D] of packed items; every (t, h, w) of `grids` is one item, all its frames together."""
        hidden = self.embeddings(pixel_values, grids)
        attend = self.item_form.attention([t * h * w for t, h, w in grids], hidden.device)
        rotation = vision_rotation(grids, self.head_dim, hidden.device)
        for layer in self.encoder.layers:
            hidden = layer(hidden, rotation, attend)
        return self.post_layernorm(hidden)


class VisionTower(nn.Module):
    """Holds the transformer under the name the released files give it."""

    def __init__(self, config: KeyeVisionConfig) -> None:
        super().__init__()
        self.vision_model = VisionTransformer(config)

    def forward(self, pixel_values: Tensor, grids: Sequence[Sequence[int]]) -> Tensor:
        return self.vision_model(pixel_values, grids)


class Projector(nn.Module):
    """Four neighbouring patch features to one row of the text model's width."""

    def __init__(self, config: KeyeConfig) -> None:
        super().__init__()
        vision = config.vision_config
        merged = vision.hidden_size * vision.spatial_merge_size**2
        self.merge_size = vision.spatial_merge_size
        self.normalises_merged_patches = config.normalises_merged_patches
        norm_width = merged if self.normalises_merged_patches else vision.hidden_size
        self.pre_norm = nn.LayerNorm(norm_width, eps=1e-5)  # of this norm alone; no field of the config holds it
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
