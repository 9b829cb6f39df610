"""Runs the model on a step's chunks: media through the tower, packed tokens through the decoder. Decides nothing."""

import logging
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from keye.worker.engine.batch_inputs import VisualRows, build_inputs
from keye.worker.engine.graph_capture import DecodeGraphs
from keye.worker.engine.kv_cache import KVCache
from keye.worker.engine.sequence import Sequence
from keye.worker.engine.step_plan import Chunk
from keye.worker.model.device import has_packed_kernels
from keye.worker.model.flex_decoding import FlexForm
from keye.worker.model.gathered_attention import GatheredForm
from keye.worker.model.keye import KeyeForConditionalGeneration
from keye.worker.model.paged_attention import AttentionForm, PagedBatch
from keye.worker.model.processor import PreparedPrompt
from keye.worker.model.varlen_attention import HAS_BLOCK_TABLES, VarlenForm

logger = logging.getLogger(__name__)


def choose_attention(device: torch.device, dtype: torch.dtype, head_dim: int, max_tokens: int) -> AttentionForm:
    """The fastest form of paged attention that runs there, for sequences of at most `max_tokens`."""
    if not has_packed_kernels(device, dtype, head_dim):
        return GatheredForm()
    return VarlenForm(max_tokens) if HAS_BLOCK_TABLES else FlexForm(max_tokens)


class ModelRunner:
    """Leaves the model as it is: who has it may `generate` with it between two steps."""

    def __init__(self, model: KeyeForConditionalGeneration, cache: KVCache, attention: AttentionForm) -> None:
        self._model = model
        self._cache = cache
        self._attention = attention
        self._graphs: DecodeGraphs | None = None
        self._device = model.device
        self._visual: dict[Sequence, tuple[VisualRows | None, VisualRows | None]] = {}

    def try_attention(self) -> None:
        """Let nobody's token be decoded. Where the kernels cannot be compiled, attention is by gathered blocks."""
        if not self._attention.table_widths:
            return
        token_id, position, length = torch.tensor([[0], [0], [1]], dtype=torch.int32, device=self._device)
        scratch = torch.tensor([[self._cache.scratch_block]], dtype=torch.int32, device=self._device)
        try:
            self._decode(token_id, position, length, scratch.repeat(1, self._attention.table_widths[0]))
        except torch.AcceleratorError:
            raise  # The device is lost.
        except Exception as error:
            slower = GatheredForm()
            logger.warning("%s does not run here, from now on %s: %r", self._attention.name, slower.name, error)
            self._attention = slower

    def capture_decoding(self, max_running: int) -> None:
        """Capture decoding steps of up to `max_running` sequences where attention and device allow it."""
        if self._device.type != "cuda" or not self._attention.table_widths:
            return
        graphs = DecodeGraphs(self._decode, self._attention.table_widths, self._cache.scratch_block, self._device)
        try:
            graphs.capture(max_running)
        except torch.AcceleratorError:
            raise  # The device is lost.
        except RuntimeError as error:
            logger.warning("decoding steps beyond %d captured graphs run uncaptured: %s", len(graphs), error)
        self._graphs = graphs

    def needs_encoding(self, chunk: Chunk) -> bool:
        """It reaches media that are yet to go through the tower."""
        sequence, num_tokens = chunk
        start = sequence.num_cached
        if sequence.pending.prompt.num_visual_tokens == 0 or start >= sequence.num_prompt_tokens:
            return False
        media = self._visual.get(sequence)
        return media is None or any(kind and kind.unencoded(start, start + num_tokens) for kind in media)

    def encode(self, chunks: Seq[Chunk]) -> None:
        """Put the media these chunks reach through tower and projector: all images in one call, all videos in one.

        Not all media of a prompt at once: a prompt of many images would hold up everyone who is decoding. What comes
        out is kept until the prompt is in the cache. A sequence that is preempted is encoded again: rows kept for
        sequences that wait would take the very memory that ran out.
        """
        for sequence, _ in chunks:
            if sequence not in self._visual:
                self._visual[sequence] = self._media_of(sequence.pending.prompt)
        for kind, encode in enumerate((self._model.get_image_features, self._model.get_video_features)):
            wanted: list[tuple[VisualRows, int]] = []
            for sequence, num_tokens in chunks:
                if media := self._visual[sequence][kind]:
                    start = sequence.num_cached
                    wanted += [(media, item) for item in media.unencoded(start, start + num_tokens)]
            if wanted:
                patches = torch.cat([media.patches(item).to(self._device) for media, item in wanted])
                rows = encode(patches, torch.stack([media.grids[item] for media, item in wanted]))
                num_rows = [media.num_rows(item) for media, item in wanted]
                for (media, item), item_rows in zip(wanted, rows.split(num_rows), strict=True):
                    media.store(item, item_rows)

    def run(self, chunks: Seq[Chunk]) -> Tensor:
        """Logits [n, V] for the next token of each of the n chunks that reach the end of their sequence, in order."""
        if self._graphs and all(sequence.is_decoding for sequence, _ in chunks):
            logits = self._graphs.run([sequence for sequence, _ in chunks])
            if logits is not None:
                return logits
        inputs = build_inputs(chunks)
        tokens = inputs.tokens.to(self._device)
        embeds = self._model.model.embed_tokens(tokens[0])
        row = 0
        for sequence, num_tokens in chunks:
            for media in self._visual.get(sequence, ()):
                if media is not None:
                    media.fill(embeds[row : row + num_tokens], sequence.num_cached)
            row += num_tokens
        batch = PagedBatch.of_spans(self._attention, self._cache, inputs.spans)
        hidden = self._model.model(embeds.unsqueeze(0), tokens[1:].unsqueeze(1), batch.attend)[0]
        if len(inputs.end_rows) < len(hidden):
            hidden = hidden[inputs.end_rows]
        return self._model.lm_head(hidden)

    def _decode(self, token_ids: Tensor, positions: Tensor, lengths: Tensor, block_tables: Tensor) -> Tensor:
        """Logits [n, V] for one token each of n sequences; all it reads is in the tensors [n] and [n, width]."""
        embeds = self._model.model.embed_tokens(token_ids).unsqueeze(0)
        batch = PagedBatch.of_decoding(self._attention, self._cache, block_tables, lengths)
        hidden = self._model.model(embeds, positions.expand(3, 1, -1), batch.attend)[0]
        return self._model.lm_head(hidden)

    def forget_media(self, sequence: Sequence) -> None:
        self._visual.pop(sequence, None)

    def wipe(self, sequence: Sequence) -> None:
        """Take what the sequence left in its blocks out of the cache."""
        self._cache.wipe(sequence.block_table)

    def _media_of(self, prompt: PreparedPrompt) -> tuple[VisualRows | None, VisualRows | None]:
        config = self._model.config
        merged = config.vision_config.spatial_merge_size**2

        def of_kind(token_id: int, patches: Tensor | None, grids: Tensor | None) -> VisualRows | None:
            if patches is None or grids is None:
                return None
            return VisualRows((prompt.input_ids == token_id).nonzero()[:, 0], patches, grids, merged)

        return (
            of_kind(config.image_token_id, prompt.pixel_values, prompt.image_grid_thw),
            of_kind(config.video_token_id, prompt.pixel_values_videos, prompt.video_grid_thw),
        )
