"""The media of a prompt, item by item, and where their rows stand in it. Encodes nothing."""

from collections.abc import Iterator
from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from keye.worker.model.configuration_keye import KeyeConfig
from keye.worker.model.device import send
from keye.worker.model.positions import PlaceholderMismatch
from keye.worker.model.processor import PreparedPrompt, digest_items


class VisualRows:
    """The images, or the videos, of one prompt, in prompt order: item by item, as the prompt's chunks need them.

    An item is what attends to itself: an image, a whole video, or a frame.

    `columns` [n] are the placeholders, `patches` [p, 3, s, s] and `grids` [items, 3] the media, `merged` how many
    patches make one row, `keys` tell an item by its pixels. Of each item are kept its `patches` and `num_rows`, and in
    `encoded` what the tower gave.
    Raises `PlaceholderMismatch` when they do not come to the same number of rows.
    """

    def __init__(self, columns: Tensor, patches: Tensor, grids: Tensor, merged: int, keys: Seq[bytes]) -> None:
        num_patches = grids.prod(dim=1)
        total = int(num_patches.sum()) // merged
        if total != len(columns):
            raise PlaceholderMismatch(f"{len(columns)} placeholder tokens, but the media give {total} rows")
        self.grids = grids
        self.keys = keys
        self.patches = patches.split(num_patches.tolist())
        self.num_rows = (num_patches // merged).tolist()
        self.encoded: dict[int, Tensor] = {}
        self._columns = columns
        self._row_ends = num_patches.cumsum(dim=0) // merged

    def unencoded(self, start: int, stop: int) -> list[int]:
        """The items that fill columns from `start` up to `stop` and are still to go through the tower."""
        first, last = self._rows_within(start, stop)
        if first == last:
            return []
        first_item, last_item = torch.searchsorted(self._row_ends, torch.tensor([first, last - 1]), right=True).tolist()
        return [item for item in range(first_item, last_item + 1) if item not in self.encoded]

    def fill(self, embeds: Tensor, start: int) -> None:
        """Put the rows into a chunk's embeddings [n, H], of the columns from `start` on."""
        first, last = self._rows_within(start, start + len(embeds))
        for item, rows in self.encoded.items():
            item_end = int(self._row_ends[item])
            item_start = item_end - len(rows)
            low, high = max(first, item_start), min(last, item_end)
            if low < high:
                columns = send((self._columns[low:high] - start).numpy(), embeds.device)
                embeds[columns] = rows[low - item_start : high - item_start].to(embeds.dtype)

    def forget_before(self, start: int) -> None:
        """The prompt is in the cache up to there; rows before are needed no more."""
        first, _ = self._rows_within(start, start)
        for item in [item for item in self.encoded if self._row_ends[item] <= first]:
            del self.encoded[item]

    def keys_in_blocks(self, block_size: int) -> Iterator[tuple[int, bytes]]:
        """In their order, the number of a block of columns and the key of an item with a row there."""
        blocks = self._columns.numpy() // block_size
        items = np.searchsorted(self._row_ends.numpy(), np.arange(len(blocks)), side="right")
        is_new = (np.diff(blocks, prepend=-1) != 0) | (np.diff(items, prepend=-1) != 0)
        for block, item in zip(blocks[is_new].tolist(), items[is_new].tolist(), strict=True):
            yield block, self.keys[item]

    def _rows_within(self, start: int, stop: int) -> tuple[int, int]:
        first, last = torch.searchsorted(self._columns, torch.tensor([start, stop])).tolist()
        return first, last


def visual_rows(prompt: PreparedPrompt, config: KeyeConfig) -> dict[str, VisualRows]:
    """Of the images and of the videos, where it has any. Raises as `VisualRows` does."""
    merged = config.vision_config.spatial_merge_size**2
    videos = prompt.video_grid_thw
    if videos is not None and config.splits_video_into_frames:
        videos = videos.repeat_interleave(videos[:, 0], dim=0)
        videos[:, 0] = 1
    return {
        kind: VisualRows(
            (prompt.input_ids == token_id).nonzero()[:, 0],
            patches,
            grids,
            merged,
            [prompt.salt + digest for digest in digests or digest_items(patches.numpy(), grids.tolist())],
        )
        for kind, token_id, patches, grids, digests in (
            ("image", config.image_token_id, prompt.pixel_values, prompt.image_grid_thw, prompt.image_digests),
            ("video", config.video_token_id, prompt.pixel_values_videos, videos, prompt.video_digests),
        )
        if patches is not None and grids is not None
    }
