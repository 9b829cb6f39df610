"""Turns a step's chunks into the packed tensors of one forward pass. Decides nothing."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from keye.worker.engine.sequence import Sequence
from keye.worker.engine.step_plan import Chunk
from keye.worker.model.paged_attention import Span


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
    """Ids and positions [4, n] of a prompt's next tokens; after a put-back they go on into what was generated."""
    prompt, num_prompt_tokens = sequence.pending.prompt, sequence.num_prompt_tokens
    start, stop = sequence.num_cached, sequence.num_cached + into.shape[1]
    num_given = max(0, num_prompt_tokens - start)
    into[0, :num_given] = prompt.input_ids[start:stop].numpy()
    into[1:, :num_given] = prompt.position_ids[:, start:stop].numpy()
    if stop > num_prompt_tokens:
        start = max(start, num_prompt_tokens)
        into[0, num_given:] = sequence.generated_ids[start - num_prompt_tokens : stop - num_prompt_tokens]
        into[1:, num_given:] = np.arange(start, stop) + prompt.rope_delta
