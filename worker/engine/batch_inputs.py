"""Turns a step's chunks into the packed tensors of one forward pass. Decides nothing."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from worker.engine.step_plan import Chunk
from worker.model.paged_attention import Span


@dataclass(frozen=True, slots=True)
class BatchInputs:
    """All chunks one behind the other: T tokens, no padding."""

    input_ids: Tensor
    """int64 [T]"""
    position_ids: Tensor
    """int64 [3, 1, T]"""
    end_rows: list[int]
    """The rows that end a sequence, chunk by chunk: the next token follows from them."""
    spans: list[Span]


def build_inputs(chunks: Seq[Chunk]) -> BatchInputs:
    """Pack the chunks in the given order, decoding sequences first."""
    num_decoding = next((i for i, chunk in enumerate(chunks) if not chunk.sequence.is_decoding), len(chunks))
    decoding = [chunk.sequence for chunk in chunks[:num_decoding]]
    ids = [torch.tensor([sequence.generated_ids[-1] for sequence in decoding], dtype=torch.long)]
    columns = [sequence.num_cached + sequence.pending.prompt.rope_delta for sequence in decoding]
    positions = [torch.tensor(columns, dtype=torch.long).expand(3, -1)]
    end_rows = list(range(num_decoding))
    num_rows = num_decoding
    for chunk in chunks[num_decoding:]:
        chunk_ids, chunk_positions = _tokens(chunk)
        ids += chunk_ids
        positions += chunk_positions
        num_rows += chunk.num_tokens
        if chunk.reaches_end:
            end_rows.append(num_rows - 1)
    spans = [Span(sequence.block_table, num, sequence.num_cached + num) for sequence, num in chunks]
    return BatchInputs(torch.cat(ids), torch.cat(positions, dim=1).unsqueeze(1), end_rows, spans)


def _tokens(chunk: Chunk) -> tuple[list[Tensor], list[Tensor]]:
    """Ids [n] and positions [3, n] of a prompt's chunk; after a put-back it goes on into what was generated."""
    sequence, num_tokens = chunk
    prompt, num_prompt_tokens = sequence.pending.prompt, sequence.num_prompt_tokens
    start, stop = sequence.num_cached, sequence.num_cached + num_tokens
    ids, positions = [prompt.input_ids[start:stop]], [prompt.position_ids[:, start:stop]]
    if stop > num_prompt_tokens:
        start = max(start, num_prompt_tokens)
        ids.append(torch.tensor(sequence.generated_ids[start - num_prompt_tokens : stop - num_prompt_tokens]))
        positions.append((torch.arange(start, stop) + prompt.rope_delta).expand(3, -1))
    return ids, positions
