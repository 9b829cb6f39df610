"""Runs the model on a step's chunks: media through the tower, packed tokens through the decoder. Decides nothing."""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from worker.engine.batch_inputs import build_inputs
from worker.engine.kv_cache import KVCache
from worker.engine.sequence import Sequence
from worker.engine.step_plan import Chunk
from worker.model.keye import KeyeForConditionalGeneration
from worker.model.paged_attention import PAGED_ATTENTION, PagedBatch
from worker.model.positions import PlaceholderMismatch

Media = tuple[Tensor | None, Tensor | None]
"""Patches and grids of one kind of media of one prompt."""


@dataclass(frozen=True, slots=True)
class VisualRows:
    """The embeddings [n, H] that stand in for the placeholders in the columns [n] of one prompt, in order."""

    columns: Tensor
    embeds: Tensor


class ModelRunner:
    """Takes the model over: from here on its attention is the paged one, and `generate` is not for it any more."""

    def __init__(self, model: KeyeForConditionalGeneration, cache: KVCache) -> None:
        model.config._attn_implementation = PAGED_ATTENTION
        self._model = model
        self._cache = cache
        self._device = model.device
        self._visual: dict[Sequence, VisualRows] = {}

    def needs_encoding(self, chunk: Chunk) -> bool:
        """Its prompt has media that are yet to go through the tower."""
        sequence = chunk.sequence
        return (
            sequence.pending.prompt.num_visual_tokens > 0
            and sequence.num_cached < sequence.num_prompt_tokens
            and sequence not in self._visual
        )

    def encode(self, chunks: Seq[Chunk]) -> None:
        """Put the media of these sequences through tower and projector: all images in one call, all videos in one.

        What comes out is kept until the prompt is in the cache. A sequence that is put back is encoded again: rows
        kept for sequences that wait would take the very memory that ran out.
        """
        prompts = [chunk.sequence.pending.prompt for chunk in chunks]
        images = self._features([(p.pixel_values, p.image_grid_thw) for p in prompts], self._model.get_image_features)
        videos = self._features(
            [(p.pixel_values_videos, p.video_grid_thw) for p in prompts], self._model.get_video_features
        )
        for chunk, image_rows, video_rows in zip(chunks, images, videos, strict=True):
            ids, config = chunk.sequence.pending.prompt.input_ids, self._model.config
            columns = torch.cat(
                [(ids == config.image_token_id).nonzero()[:, 0], (ids == config.video_token_id).nonzero()[:, 0]]
            )
            rows = torch.cat([image_rows, video_rows])
            if len(columns) != len(rows):
                raise PlaceholderMismatch(f"{len(columns)} placeholder tokens, but the media give {len(rows)} rows")
            columns, order = columns.sort()
            self._visual[chunk.sequence] = VisualRows(columns, rows[order.to(self._device)])

    def run(self, chunks: Seq[Chunk]) -> Tensor:
        """Logits [n, V] for the next token of each of the n chunks that reach the end of their sequence, in order."""
        inputs = build_inputs(chunks)
        embeds = self._model.model.embed_tokens(inputs.input_ids.to(self._device))
        row = 0
        for sequence, num_tokens in chunks:
            if sequence in self._visual:
                _fill(embeds[row : row + num_tokens], self._visual[sequence], sequence.num_cached)
            row += num_tokens
        hidden = self._model.model(
            embeds.unsqueeze(0),
            inputs.position_ids.to(self._device),
            batch=PagedBatch(self._cache, inputs.spans),
        ).last_hidden_state[0]
        if len(inputs.end_rows) < len(hidden):
            hidden = hidden[inputs.end_rows]
        return self._model.lm_head(hidden)

    def forget_media(self, sequence: Sequence) -> None:
        self._visual.pop(sequence, None)

    def wipe(self, sequence: Sequence) -> None:
        """Take what the sequence left in its blocks out of the cache."""
        self._cache.wipe(sequence.block_table)

    def _features(self, media: Seq[Media], encode: Callable[[Tensor, Tensor], Tensor]) -> Seq[Tensor]:
        """The rows [n, H] of each prompt's media of one kind, from one call for all of them."""
        given = [(patches, grids) for patches, grids in media if patches is not None and grids is not None]
        none = torch.empty(0, self._model.config.hidden_size, dtype=self._model.dtype, device=self._device)
        if not given:
            return [none] * len(media)
        patches = torch.cat([patches for patches, _ in given]).to(self._device)
        rows = encode(patches, torch.cat([grids for _, grids in given])).to(self._model.dtype)
        merged = self._model.config.vision_config.spatial_merge_size**2
        num_rows = [0 if grids is None else int(grids.prod(dim=1).sum()) // merged for _, grids in media]
        return rows.split(num_rows)


def _fill(embeds: Tensor, visual: VisualRows, start: int) -> None:
    """Put the visual rows of the columns from `start` on into the chunk's embeddings [n, H]."""
    first, last = torch.searchsorted(visual.columns, torch.tensor([start, start + len(embeds)])).tolist()
    embeds[(visual.columns[first:last] - start).to(embeds.device)] = visual.embeds[first:last]
