"""The media of one prompt: which placeholder each item fills, and the rows that have come out of the tower so far."""

import torch
from torch import Tensor

from keye.worker.model.positions import PlaceholderMismatch


class VisualRows:
    """The images, or the videos, of one prompt, in prompt order: item by item, as the prompt's chunks need them.

    `columns` [n] are the placeholders, `patches` [p, 3, s, s] and `grids` [items, 3] the media, `merged` how many
    patches make one row. Raises `PlaceholderMismatch` when they do not come to the same number of rows.
    """

    def __init__(self, columns: Tensor, patches: Tensor, grids: Tensor, merged: int) -> None:
        num_patches = grids.prod(dim=1)
        num_rows = int(num_patches.sum()) // merged
        if num_rows != len(columns):
            raise PlaceholderMismatch(f"{len(columns)} placeholder tokens, but the media give {num_rows} rows")
        self.grids = grids
        self._columns = columns
        self._patches = patches.split(num_patches.tolist())
        self._row_ends = num_patches.cumsum(dim=0) // merged
        self._encoded: dict[int, Tensor] = {}

    def unencoded(self, start: int, stop: int) -> list[int]:
        """The items that fill columns from `start` up to `stop` and are still to go through the tower."""
        first, last = self._rows_within(start, stop)
        if first == last:
            return []
        first_item, last_item = torch.searchsorted(self._row_ends, torch.tensor([first, last - 1]), right=True).tolist()
        return [item for item in range(first_item, last_item + 1) if item not in self._encoded]

    def patches(self, item: int) -> Tensor:
        return self._patches[item]

    def num_rows(self, item: int) -> int:
        ends = self._row_ends
        return int(ends[item] - ends[item - 1]) if item else int(ends[0])

    def store(self, item: int, rows: Tensor) -> None:
        self._encoded[item] = rows

    def fill(self, embeds: Tensor, start: int) -> None:
        """Put the rows into a chunk's embeddings [n, H], of the columns from `start` on."""
        first, last = self._rows_within(start, start + len(embeds))
        for item, rows in self._encoded.items():
            item_end = int(self._row_ends[item])
            item_start = item_end - len(rows)
            low, high = max(first, item_start), min(last, item_end)
            if low < high:
                columns = (self._columns[low:high] - start).to(embeds.device)
                embeds[columns] = rows[low - item_start : high - item_start].to(embeds.dtype)

    def _rows_within(self, start: int, stop: int) -> tuple[int, int]:
        first, last = torch.searchsorted(self._columns, torch.tensor([start, stop])).tolist()
        return first, last
