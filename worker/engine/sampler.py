"""Chooses the next token of every sequence at once. What a sequence draws does not depend on who runs beside it."""

from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from keye.worker.engine.sequence import Sequence

_NOT_A_NUMBER = -1


class Sampler:
    """Keeps what the latest batch asks for, and which tokens sequences with a repetition penalty have seen."""

    def __init__(self) -> None:
        self._batch: _Batch | None = None
        self._seen: dict[Sequence, Tensor] = {}

    def choose(self, logits: Tensor, sequences: Seq[Sequence]) -> list[int | None]:
        """The next token for each row of `logits` [n, V]; None for a row with a logit that is not a number.

        As in transformers: repetition penalty, temperature, top-k, top-p. The draw is by the sequence's own generator.
        """
        if self._batch is None or self._batch.sequences != sequences:
            self._batch = _Batch(sequences, logits)
        batch = self._batch
        logits = logits.float()
        if batch.penalised:
            logits = self._penalise(logits, batch)
        if not batch.sampled:
            choice = _best(logits)
        elif len(batch.sampled) == len(sequences):
            choice = batch.draw(logits)
        else:
            rows = batch.sampled_rows
            choice = _best(logits).index_copy(0, rows, batch.draw(logits.index_select(0, rows)))
        # Read once: on a GPU each reading waits for all that was queued.
        numbers: list[int] = choice.tolist()
        for row in batch.penalised:
            if numbers[row] != _NOT_A_NUMBER:
                self._seen[sequences[row]][numbers[row]] = True
        return [None if number == _NOT_A_NUMBER else number for number in numbers]

    def forget(self, sequence: Sequence) -> None:
        self._batch = None
        self._seen.pop(sequence, None)

    def _penalise(self, logits: Tensor, batch: "_Batch") -> Tensor:
        seen = torch.stack([self._seen_by(batch.sequences[row], logits) for row in batch.penalised])
        scores = logits.index_select(0, batch.penalised_rows)
        penalised = torch.where(scores < 0, scores * batch.penalty, scores / batch.penalty)
        return logits.index_copy(0, batch.penalised_rows, torch.where(seen, penalised, scores))

    def _seen_by(self, sequence: Sequence, logits: Tensor) -> Tensor:
        """Bool [V]: the tokens of the prompt and those generated so far."""
        if sequence not in self._seen:
            seen = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
            seen[sequence.pending.prompt.input_ids.to(logits.device)] = True
            self._seen[sequence] = seen
        return self._seen[sequence]


class _Batch:
    """What these sequences ask for, as tensors: the same sequences are stepped together many times.

    `sampled` are the rows that draw, `penalised` those with a repetition penalty; each is there as a tensor, too.
    """

    def __init__(self, sequences: Seq[Sequence], logits: Tensor) -> None:
        self.sequences = list(sequences)
        options = [sequence.pending.sampling for sequence in sequences]
        self.penalised = [row for row, option in enumerate(options) if option.repetition_penalty != 1]
        self.penalised_rows = torch.tensor(self.penalised, device=logits.device)
        self.penalty = _column([options[row].repetition_penalty for row in self.penalised], logits.device)
        self.sampled = [row for row, option in enumerate(options) if option.temperature > 0]
        self.sampled_rows = torch.tensor(self.sampled, device=logits.device)
        drawing = [options[row] for row in self.sampled]
        self._rngs = [sequences[row].rng for row in self.sampled]
        self._temperature = _column([option.temperature for option in drawing], logits.device)
        self._top_p = _column([option.top_p for option in drawing], logits.device)
        vocab_size = logits.shape[-1]
        top_k = [min(option.top_k or vocab_size, vocab_size) for option in drawing]
        self._most = max(top_k, default=0)
        self._last = torch.tensor(top_k, device=logits.device).unsqueeze(-1) - 1
        self._top_k_differs = len(set(top_k)) > 1

    def draw(self, logits: Tensor) -> Tensor:
        """Token ids [n] for the logits [n, V] of the `sampled` rows, `_NOT_A_NUMBER` where the best logit is none."""
        best, token_ids = logits.topk(self._most, dim=-1)
        scores = best / self._temperature
        if self._top_k_differs:
            scores.masked_fill_(torch.arange(self._most, device=scores.device) > self._last, -torch.inf)
        # Shares of the last sum, not of 1: a softmax divides what need not be divided, and wakes threads on a CPU.
        cumulative = (scores - scores[:, :1]).exp().cumsum(dim=-1)
        whole = cumulative[:, -1:]
        # A token is kept while those before it have less than top_p together.
        last = torch.searchsorted(cumulative, self._top_p * whole).minimum(self._last)
        # Drawn on the host, a number a token: a seed gives the same text on every device and after a preemption.
        point = _column([rng.random() for rng in self._rngs], logits.device)
        # Rounding may push a point to the very end, behind the last token that is kept.
        drawn = torch.searchsorted(cumulative, point * cumulative.gather(-1, last), right=True).minimum(last)
        # Where the best logit is none, the whole is none, and equals not even itself.
        return token_ids.gather(-1, drawn).where(whole == whole, _NOT_A_NUMBER).squeeze(-1)


def _best(logits: Tensor) -> Tensor:
    """Token ids [n], `_NOT_A_NUMBER` where the best logit is none."""
    best, token_ids = logits.max(dim=-1)
    # `isfinite` would be four kernels.
    return token_ids.where(best.abs() < torch.inf, _NOT_A_NUMBER)


def _column(numbers: Seq[float], device: torch.device) -> Tensor:
    """Float32 [n, 1]."""
    column = torch.from_numpy(np.array(numbers, dtype=np.float32)[:, None])
    if device.type == "cpu":
        return column
    # Pinned, because any other copy waits for the whole forward pass that is still running.
    return column.pin_memory().to(device, non_blocking=True)
