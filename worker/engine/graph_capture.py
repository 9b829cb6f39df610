"""Decoding steps recorded once and replayed: on a GPU the launches of a small step cost more time than its work."""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from functools import partial

import numpy as np
import torch
from torch import Tensor

from keye.worker.engine.sequence import Sequence

Forward = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Token ids, positions and lengths int32 [n], block tables int32 [n, width] to logits [n, V]."""

Replay = Callable[[], Tensor]


class DecodeGraphs:
    """One graph for each size of batch (powers of two) and width of block table; a step takes the smallest it fits.

    Rows that fill a batch up are sequences of one token in the scratch block.
    """

    def __init__(
        self,
        forward: Forward,
        table_widths: Seq[int],
        scratch_block: int,
        device: torch.device,
        record: Callable[[Replay], Replay] | None = None,
    ) -> None:
        self._forward = forward
        self._widths = sorted(table_widths)
        self._scratch_block = scratch_block
        self._device = device
        self._record = record or CudaRecorder()
        self._steps: dict[tuple[int, int], tuple[_StepInputs, Replay]] = {}

    def capture(self, max_running: int) -> None:
        """Record all steps of up to `max_running` sequences, the largest first: the others reuse its memory."""
        sizes = [1 << power for power in range((max_running - 1).bit_length() + 1)]
        for size in reversed(sizes):
            for width in reversed(self._widths):
                inputs = _StepInputs(size, width, self._scratch_block, self._device)
                inputs.fill([])
                self._steps[size, width] = inputs, self._record(partial(self._forward, *inputs.on_device))

    def run(self, sequences: Seq[Sequence]) -> Tensor | None:
        """Logits [n, V] of the n decoding sequences, overwritten by the next run; None where no graph is fitting."""
        size = 1 << (len(sequences) - 1).bit_length()
        longest = max(len(sequence.block_table) for sequence in sequences)
        width = next((width for width in self._widths if width >= longest), 0)
        if (size, width) not in self._steps:
            return None
        inputs, replay = self._steps[size, width]
        inputs.fill(sequences)
        return replay()[: len(sequences)]


class _StepInputs:
    """All that a recorded step reads, in one buffer, so that it costs one copy to the device."""

    def __init__(self, size: int, width: int, scratch_block: int, device: torch.device) -> None:
        self._scratch_block = scratch_block
        self._host = torch.zeros(size * (3 + width), dtype=torch.int32, pin_memory=device.type == "cuda")
        self._device = torch.empty_like(self._host, device=device)
        columns, tables = _views(self._host, size)
        self._columns, self._tables = columns.numpy(), tables.numpy()
        columns, tables = _views(self._device, size)
        self.on_device = (*columns.unbind(), tables)

    def fill(self, sequences: Seq[Sequence]) -> None:
        """The host's side is free to be written: the tokens of the step before have been read from the device."""
        num = len(sequences)
        self._columns[:, :num] = (
            [sequence.generated_ids[-1] for sequence in sequences],
            [sequence.num_cached + sequence.pending.prompt.rope_delta for sequence in sequences],
            [sequence.num_tokens for sequence in sequences],
        )
        self._columns[:, num:] = np.array([[0], [0], [1]])
        self._tables[:] = self._scratch_block
        for row, sequence in enumerate(sequences):
            self._tables[row, : len(sequence.block_table)] = sequence.block_table
        self._device.copy_(self._host, non_blocking=True)


class CudaRecorder:
    """Records into CUDA graphs that share their memory: only one of them runs at a time.

    All on one stream: libraries keep a workspace for each stream they ever worked on.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def __call__(self, run: Replay) -> Replay:
        # Once without recording: first calls compile kernels and take workspaces, which a recording must not.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            run()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            output = run()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay


def _views(buffer: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Ids, positions and lengths [3, size], and block tables [size, width]."""
    return buffer[: 3 * size].view(3, size), buffer[3 * size :].view(size, -1)
