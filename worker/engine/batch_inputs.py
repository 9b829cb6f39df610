"""What one forward pass reads: a step's chunks as packed tensors, and the rows of media for their placeholders."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from keye.worker.engine.sequence import Sequence
from keye.worker.engine.step_plan import Chunk
from keye.worker.model.paged_attention import Span
from keye.worker.model.positions import PlaceholderMismatch


@dataclass(frozen=True, slots=True)
class BatchInputs:
    """All chunks one behind the other: T tokens, no padding."""

    tokens: Tensor
    """int64 [4, T] on the host: ids, and three rows of positions."""
    end_rows: list[int]
    """The rows that end a sequence, chunk by chunk: the next token follows from them."""
    spans: list[Span]


def build_inputs(chunks: Seq[Chunk]) -> BatchInputs:
    """Pack the chunks in the given order, decoding sequences first."""
    num_decoding = next((i for i, chunk in enumerate(chunks) if not chunk.sequence.is_decoding), len(chunks))
    decoding = [chunk.sequence for chunk in chunks[:num_decoding]]
    prompts = chunks[num_decoding:]
    # Ids and three rows of positions: written by numpy, which is quicker at small things, and sent as one.
    tokens = np.empty((4, num_decoding + sum(chunk.num_tokens for chunk in prompts)), dtype=np.int64)
    tokens[0, :num_decoding] = [sequence.generated_ids[-1] for sequence in decoding]
    tokens[1:, :num_decoding] = [sequence.num_cached + sequence.pending.prompt.rope_delta for sequence in decoding]
    end_rows = list(range(num_decoding))
    row = num_decoding
    for chunk in prompts:
        _write_tokens(tokens[:, row : row + chunk.num_tokens], chunk.sequence)
        row += chunk.num_tokens
        if chunk.reaches_end:
            end_rows.append(row - 1)
    spans = [Span(sequence.block_table, num, sequence.num_cached + num) for sequence, num in chunks]
    return BatchInputs(torch.from_numpy(tokens), end_rows, spans)


def _write_tokens(into: np.ndarray, sequence: Sequence) -> None:
    """Ids and positions [4, n] of a prompt's next tokens; after a preemption they go on into what was generated."""
    prompt, num_prompt_tokens = sequence.pending.prompt, sequence.num_prompt_tokens
    start, stop = sequence.num_cached, sequence.num_cached + into.shape[1]
    num_given = max(0, num_prompt_tokens - start)
    into[0, :num_given] = prompt.input_ids[start:stop].numpy()
    into[1:, :num_given] = prompt.position_ids[:, start:stop].numpy()
    if stop > num_prompt_tokens:
        start = max(start, num_prompt_tokens)
        into[0, num_given:] = sequence.generated_ids[start - num_prompt_tokens : stop - num_prompt_tokens]
        into[1:, num_given:] = np.arange(start, stop) + prompt.rope_delta


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
