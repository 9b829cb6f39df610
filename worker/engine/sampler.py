"""Chooses the next token of every sequence at once. What a sequence draws does not depend on who runs beside it."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from keye.worker.engine.sequence import Sequence
from keye.worker.engine.token_masks import StepMasks
from keye.worker.model.device import send

_NOT_A_NUMBER = -1

# Logits divided by much less go beyond what float32 holds. What is drawn is the best already, and what is penalised by
# less than one ahead of all others.
LEAST_TEMPERATURE = LEAST_PENALTY = 1e-6


class Sampler:
    """Keeps what the latest batch asks for."""

    def __init__(self) -> None:
        self._batch: _Batch | None = None

    def choose(self, logits: Tensor, sequences: Seq[Sequence], masks: StepMasks | None = None) -> list[int | None]:
        """The next token for each row of `logits` [n, V]; None for a row with a logit that is not a number.

        As in transformers: repetition penalty, temperature, top-k, top-p. The draw is by the sequence's own generator.
        A sequence that asks for logprobs is given its `logprob_of`.
        """
        if self._batch is None or self._batch.sequences != sequences:
            self._batch = _Batch(sequences, logits)
        batch = self._batch
        logits = logits.float()
        # Before the draw, as all that takes memory: a step that is tried again for want of it draws nothing twice.
        logprobs = batch.logprobs(logits) if batch.reporting else None
        if held := [row for row in batch.bounded if sequences[row].must_go_on]:
            logits = batch.hold(logits, held)
        if masks is not None:
            logits = masks.apply(logits)
        if batch.penalised:
            logits = batch.penalise(logits)
        if not batch.sampled:
            choice = _best(logits)
        elif len(batch.sampled) == len(sequences):
            choice = batch.draw(logits)
        else:
            rows = batch.sampled_rows
            choice = _best(logits).index_copy(0, rows, batch.draw(logits.index_select(0, rows)))
        if batch.penalised:
            batch.see(choice)
        # Read once: on a GPU each reading waits for all that was queued.
        numbers: list[int] = choice.tolist() if logprobs is None else batch.report(logprobs, choice)
        return [None if number == _NOT_A_NUMBER else number for number in numbers]

    def forget_batch(self) -> None:
        """One of its sequences has ended, or was given another token than the one that was chosen."""
        self._batch = None


@dataclass(frozen=True, eq=False, slots=True)
class _Logprob:
    """Of the token that was chosen, and of all [V]: another may be written in its place."""

    token_id: int
    logprob: float
    of_all: Tensor

    def __call__(self, token_id: int) -> float:
        return self.logprob if token_id == self.token_id else float(self.of_all[token_id])


class _Batch:
    """What these sequences ask for, as tensors: the same sequences are stepped together many times.

    `sampled` are the rows that draw, `penalised` those with a repetition penalty, `reporting` those that ask for
    logprobs; each is there as a tensor, too. `bounded` are those that have `min_tokens`.
    """

    def __init__(self, sequences: Seq[Sequence], logits: Tensor) -> None:
        self.sequences = list(sequences)
        options = [sequence.pending.sampling for sequence in sequences]
        vocab_size, self._device = logits.shape[-1], logits.device
        self.penalised = [row for row, option in enumerate(options) if option.repetition_penalty != 1]
        self._penalised_rows = self._send(self.penalised, np.int64)
        self._penalty = self._column([max(options[row].repetition_penalty, LEAST_PENALTY) for row in self.penalised])
        self._seen = self._seen_tokens([sequences[row] for row in self.penalised], vocab_size)
        self.sampled = [row for row, option in enumerate(options) if option.temperature >= LEAST_TEMPERATURE]
        self.sampled_rows = self._send(self.sampled, np.int64)
        drawing = [options[row] for row in self.sampled]
        self._rngs = [sequences[row].rng for row in self.sampled]
        self._temperature = self._column([option.temperature for option in drawing])
        self._top_p = self._column([option.top_p for option in drawing])
        top_k = [min(option.top_k or vocab_size, vocab_size) for option in drawing]
        self._most = max(top_k, default=0)
        self._last = self._send(top_k, np.int64).unsqueeze(-1) - 1
        self._top_k_differs = len(set(top_k)) > 1
        self.bounded = [row for row, option in enumerate(options) if option.min_tokens]
        self.reporting = [row for row, option in enumerate(options) if option.logprobs]
        self._reporting_rows = self._send(self.reporting, np.int64)

    def hold(self, logits: Tensor, rows: Seq[int]) -> Tensor:
        """Logits [n, V] by which none of these rows ends."""
        ends = [(r, end) for r in rows for end in self.sequences[r].eos_token_ids if end < logits.shape[-1]]
        places = send(np.array(ends, np.int64).reshape(-1, 2), self._device).unbind(-1)
        return logits.index_put(places, logits.new_full((), -torch.inf))

    def logprobs(self, logits: Tensor) -> Tensor:
        """Float32 [k, V] of the `reporting` rows, by the model's own logits [n, V]."""
        logprobs = logits.index_select(0, self._reporting_rows).log_softmax(-1)
        # JSON has no infinity, and what overflowed may be a token that must not be chosen.
        least = torch.finfo(torch.float32).min
        return logprobs.nan_to_num_(nan=least, neginf=least)

    def report(self, logprobs: Tensor, choice: Tensor) -> list[int]:
        """Read the tokens [n] that were chosen, and give the `reporting` rows what the model thought of them."""
        token_ids = choice.index_select(0, self._reporting_rows).clamp(min=0)
        told = logprobs.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
        # Of 64 bits each, which hold any token id.
        numbers = torch.cat([choice.double(), told.double()]).tolist()
        chosen = [int(number) for number in numbers[: len(choice)]]
        for row, logprob, of_all in zip(self.reporting, numbers[len(choice) :], logprobs, strict=True):
            self.sequences[row].logprob_of = _Logprob(chosen[row], logprob, of_all)
        return chosen

    def penalise(self, logits: Tensor) -> Tensor:
        """Logits [n, V], those of tokens that the `penalised` rows have seen made smaller."""
        scores = logits.index_select(0, self._penalised_rows)
        penalised = torch.where(scores < 0, scores * self._penalty, scores / self._penalty)
        return logits.index_copy(0, self._penalised_rows, torch.where(self._seen, penalised, scores))

    def see(self, choice: Tensor) -> None:
        """Take note of the tokens [n] that were chosen, where they are: each one read would be waited for."""
        # A row that is not a number sees token 0, and ends.
        token_ids = choice.index_select(0, self._penalised_rows).clamp(min=0)
        self._seen.scatter_(1, token_ids.unsqueeze(-1), True)

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
        point = self._column([rng.random() for rng in self._rngs])
        # Rounding may push a point to the very end, behind the last token that is kept.
        drawn = torch.searchsorted(cumulative, point * cumulative.gather(-1, last), right=True).minimum(last)
        # Where the best logit is none, the whole is none, and equals not even itself.
        return token_ids.gather(-1, drawn).where(whole == whole, _NOT_A_NUMBER).squeeze(-1)

    def _seen_tokens(self, sequences: Seq[Sequence], vocab_size: int) -> Tensor:
        """Bool [n, V]: the tokens of each prompt and those generated so far."""
        seen = torch.zeros(len(sequences), vocab_size, dtype=torch.bool, device=self._device)
        for_all = [np.empty(0, np.int64)]
        for row, sequence in enumerate(sequences):
            for token_ids in (sequence.pending.prompt.input_ids.numpy(), np.array(sequence.generated_ids, np.int64)):
                for_all.append(row * vocab_size + token_ids)
        seen.view(-1).index_fill_(0, send(np.concatenate(for_all), self._device), True)
        return seen

    def _send(self, numbers: Seq[float], dtype: type[np.generic]) -> Tensor:
        return send(np.array(numbers, dtype), self._device)

    def _column(self, numbers: Seq[float]) -> Tensor:
        """Float32 [n, 1]."""
        return self._send(numbers, np.float32).unsqueeze(-1)


def _best(logits: Tensor) -> Tensor:
    """Token ids [n], `_NOT_A_NUMBER` where the best logit is none."""
    best, token_ids = logits.max(dim=-1)
    # `isfinite` would be four kernels.
    return token_ids.where(best.abs() < torch.inf, _NOT_A_NUMBER)
