"""Runs the model on a step's chunks: media through the tower, packed tokens through the decoder. Decides nothing."""

import logging
from collections.abc import Callable
from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from keye.worker.engine.graph_capture import DecodeGraphs
from keye.worker.engine.memory import too_large
from keye.worker.engine.row_cache import RowCache
from keye.worker.engine.sequence import Sequence
from keye.worker.engine.step_plan import Chunk
from keye.worker.engine.visual_rows import VisualRows, visual_rows
from keye.worker.model.device import send
from keye.worker.model.device_faults import is_device_lost, is_out_of_memory
from keye.worker.model.keye import KeyeForConditionalGeneration
from keye.worker.model.paged_attention import AttentionForm, KVCache, Span, attend_decoding, attend_spans
from keye.worker.model.vision_tower import MAX_PATCHES

logger = logging.getLogger(__name__)


class ModelRunner:
    """Leaves the model as it is: who has it may `generate` with it between two steps."""

    def __init__(
        self, model: KeyeForConditionalGeneration, cache: KVCache, attention: AttentionForm, max_row_bytes: int
    ) -> None:
        """`max_row_bytes` bounds what is kept of encoded media for prompts to come."""
        self._model = model
        self._cache = cache
        self._attention = attention
        self._graphs: DecodeGraphs | None = None
        self._device = model.device
        self._visual: dict[Sequence, dict[str, VisualRows]] = {}
        self._rows = RowCache(max_row_bytes)

    def capture_decoding(self, max_running: int) -> None:
        """Capture decoding steps of up to `max_running` sequences where attention allows it."""
        if not self._attention.table_widths:
            return
        graphs = DecodeGraphs(self._decode, self._attention.table_widths, self._cache.scratch_block, self._device)
        try:
            graphs.capture(max_running)
        except RuntimeError as error:
            if is_device_lost(error):
                raise
            # Not even those that were captured: when the one that failed is destroyed, torch clears workspaces that
            # the others replay with (pytorch issue 193402).
            logger.warning("decoding steps run uncaptured, because capturing one failed: %s", error)
        else:
            self._graphs = graphs

    def needs_encoding(self, chunk: Chunk) -> bool:
        """It reaches media that are yet to go through the tower."""
        sequence, num_tokens = chunk
        start = sequence.num_cached
        if sequence.pending.prompt.num_visual_tokens == 0 or start >= sequence.num_prompt_tokens:
            return False
        media = self._visual.get(sequence)
        return media is None or any(rows.unencoded(start, start + num_tokens) for rows in media.values())

    def encode(self, chunks: Seq[Chunk]) -> None:
        """Put the items these chunks reach through tower and projector: all images in one call, all videos in one.

        Those of a sequence that runs out of memory by itself go one by one.

        Not all media of a prompt at once: a prompt of many images would hold up everyone who is decoding. What comes
        out is kept until the prompt is in the cache as far, and for others that show the same as long as there is room
        for it: what two of these chunks show, or one of a prompt before, is encoded once.
        """
        for sequence, _ in chunks:
            if sequence not in self._visual:
                self._visual[sequence] = visual_rows(sequence.pending.prompt, self._model.config)
        for kind, encode in (("image", self._model.get_image_features), ("video", self._model.get_video_features)):
            shown: dict[bytes, list[tuple[VisualRows, int]]] = {}
            for sequence, num_tokens in chunks:
                if media := self._visual[sequence].get(kind):
                    start = sequence.num_cached
                    media.forget_before(start)
                    for item in media.unencoded(start, start + num_tokens):
                        if (rows := self._rows.find(media.keys[item])) is not None:
                            media.encoded[item] = rows
                        else:
                            shown.setdefault(media.keys[item], []).append((media, item))
            if not shown:
                continue
            wanted = list(shown.values())
            try:
                self._encode(encode, wanted)
                continue
            except Exception as error:
                if len(chunks) > 1 or len(wanted) == 1 or not is_out_of_memory(error):
                    raise
            # Not before the error is gone: its traceback holds the tensors of the failed attempt.
            self._rows.clear()
            torch.cuda.empty_cache()
            for one in wanted:
                self._encode(encode, [one])

    def why_too_large(self, chunk: Chunk) -> str:
        """Of a chunk that found no room, alone: what it asked for, and what is known to have room."""
        sequence, num_tokens = chunk
        start = sequence.num_cached
        for kind, media in self._visual.get(sequence, {}).items():
            for item in media.unencoded(start, start + num_tokens):
                patch_size = self._model.config.vision_config.patch_size
                return too_large(kind, media.grids[item].tolist(), patch_size, self._model.most_patches)
        return (
            f"There is no room in the device's memory for a job of {sequence.num_tokens} tokens. "
            "Shorten the text, or lower max_pixels, max_frames or fps."
        )

    def run(self, chunks: Seq[Chunk]) -> Tensor:
        """Logits [n, V] for the next token of each of the n chunks that reach the end of their sequence, in order."""
        if self._graphs and all(sequence.is_decoding for sequence, _ in chunks):
            logits = self._graphs.run([sequence for sequence, _ in chunks])
            if logits is not None:
                return logits
        host_tokens, end_rows, spans = _build_inputs(chunks)
        tokens = send(host_tokens, self._device)
        embeds = self._model.model.embed_tokens(tokens[0])
        row = 0
        for sequence, num_tokens in chunks:
            for media in self._visual.get(sequence, {}).values():
                media.fill(embeds[row : row + num_tokens], sequence.num_cached)
            row += num_tokens
        attend = attend_spans(self._attention, self._cache, spans)
        hidden = self._model.model(embeds.unsqueeze(0), tokens[1:].unsqueeze(1), attend)[0]
        if len(end_rows) < len(hidden):
            hidden = hidden.index_select(0, send(np.array(end_rows, np.int64), self._device))
        return self._model.lm_head(hidden)

    def _decode(self, token_ids: Tensor, positions: Tensor, lengths: Tensor, block_tables: Tensor) -> Tensor:
        """Logits [n, V] for one token each of n sequences; all it reads is in the tensors [n] and [n, width]."""
        embeds = self._model.model.embed_tokens(token_ids).unsqueeze(0)
        attend = attend_decoding(self._attention, self._cache, block_tables, lengths)
        hidden = self._model.model(embeds, positions.expand(3, 1, -1), attend)[0]
        return self._model.lm_head(hidden)

    def forget_media(self, sequence: Sequence) -> None:
        self._visual.pop(sequence, None)

    def distrust_media(self, sequence: Sequence) -> None:
        """What it shows has led to numbers that are not finite: nobody is to be given the same rows."""
        for media in self._visual.get(sequence, {}).values():
            for key in media.keys:
                self._rows.forget(key)

    def make_room(self) -> bool:
        """Let go of what is kept for prompts to come; False where that was nothing."""
        return self._rows.clear()

    def let_go(self) -> None:
        """Of captured steps, which know this runner as it knows them, and of encoded media. It runs nothing after."""
        self._graphs = None
        self._visual.clear()
        self._rows.clear()

    def _encode(self, encode: Callable[[Tensor, Tensor], Tensor], wanted: Seq[Seq[tuple[VisualRows, int]]]) -> None:
        """Each of the wanted is one item, as the prompts have it that show it."""
        firsts = [places[0] for places in wanted]
        patches = [media.patches[item] for media, item in firsts]
        # More stay on the host: of what goes through in parts, the tower fetches them part by part, too.
        if sum(map(len, patches)) <= MAX_PATCHES:
            patches = [send(item.numpy(), self._device) for item in patches]
        packed = patches[0] if len(patches) == 1 else torch.cat(patches)
        rows = encode(packed, torch.stack([media.grids[item] for media, item in firsts]))
        num_rows = [media.num_rows[item] for media, item in firsts]
        for places, item_rows in zip(wanted, rows.split(num_rows), strict=True):
            first, number = places[0]
            kept = self._rows.keep(first.keys[number], item_rows)
            for media, item in places:
                media.encoded[item] = kept


def _build_inputs(chunks: Seq[Chunk]) -> tuple[np.ndarray, list[int], list[Span]]:
    """Pack the chunks in the given order, decoding sequences first: T tokens one behind the other, no padding.

    Ids and three rows of positions int64 [4, T], on the host; of the T rows those that end a sequence, chunk by chunk,
    from which the next tokens follow; and each chunk's span.
    """
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
    return tokens, end_rows, spans


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
