"""Chooses the next token of every sequence at once. What a sequence draws does not depend on who runs beside it."""

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from worker.engine.sequence import Sequence

_NOT_A_NUMBER = -1


class Sampler:
    """Keeps, for sequences with a repetition penalty, which tokens they have seen."""

    def __init__(self) -> None:
        self._seen: dict[Sequence, Tensor] = {}

    def choose(self, logits: Tensor, sequences: Seq[Sequence]) -> list[int | None]:
        """The next token for each row of `logits` [n, V]; None for a row with a logit that is not a number.

        As in transformers: repetition penalty, temperature, top-k, top-p. The draw is by the sequence's own generator.
        """
        logits = self._penalised(logits.float(), sequences)
        sampled = [row for row, sequence in enumerate(sequences) if sequence.pending.sampling.temperature > 0]
        if not sampled:
            choice = _best(logits)
        elif len(sampled) == len(sequences):
            choice = _draw(logits, sequences)
        else:
            choice = _best(logits)
            choice[sampled] = _draw(logits[sampled], [sequences[row] for row in sampled])
        # Read once: on a GPU each reading waits for all that was queued.
        numbers: list[int] = choice.tolist()
        chosen = [None if number == _NOT_A_NUMBER else number for number in numbers]
        for sequence, token_id in zip(sequences, chosen, strict=True):
            if token_id is not None and sequence in self._seen:
                self._seen[sequence][token_id] = True
        return chosen

    def forget(self, sequence: Sequence) -> None:
        self._seen.pop(sequence, None)

    def _penalised(self, logits: Tensor, sequences: Seq[Sequence]) -> Tensor:
        rows = [row for row, sequence in enumerate(sequences) if sequence.pending.sampling.repetition_penalty != 1]
        if not rows:
            return logits
        seen = torch.stack([self._seen_by(sequences[row], logits) for row in rows])
        (penalty,) = _columns([[sequences[row].pending.sampling.repetition_penalty for row in rows]], logits)
        scores = logits[rows]
        penalised = torch.where(scores < 0, scores * penalty, scores / penalty)
        logits = logits.clone()
        logits[rows] = torch.where(seen, penalised, scores)
        return logits

    def _seen_by(self, sequence: Sequence, logits: Tensor) -> Tensor:
        """Bool [V]: the tokens of the prompt and those generated so far."""
        if sequence not in self._seen:
            seen = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
            seen[sequence.pending.prompt.input_ids.to(logits.device)] = True
            self._seen[sequence] = seen
        return self._seen[sequence]


def _best(logits: Tensor) -> Tensor:
    """Token ids [n], `_NOT_A_NUMBER` where the best logit is none."""
    best, token_ids = logits.max(dim=-1)
    return token_ids.where(best.isfinite(), _NOT_A_NUMBER)


def _draw(logits: Tensor, sequences: Seq[Sequence]) -> Tensor:
    """The same for sequences that sample."""
    options = [sequence.pending.sampling for sequence in sequences]
    # Drawn on the host, a number a token, so that a seed gives the same text on every device and after a put-back.
    points = [sequence.rng.random() for sequence in sequences]
    temperatures, top_ps = [option.temperature for option in options], [option.top_p for option in options]
    temperature, top_p, point = _columns([temperatures, top_ps, points], logits)
    vocab_size = logits.shape[-1]
    top_k = [min(option.top_k or vocab_size, vocab_size) for option in options]
    most = max(top_k)
    scores, token_ids = (logits / temperature).topk(most, dim=-1)
    limits = None if min(top_k) == most else torch.tensor(top_k, device=logits.device).unsqueeze(-1)
    if limits is not None:
        scores = scores.masked_fill(torch.arange(most, device=logits.device) >= limits, -torch.inf)
    probabilities = scores.softmax(dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    # A token is kept while those before it have less than top_p together.
    num_kept = torch.searchsorted(cumulative - probabilities, top_p)
    if limits is not None:
        num_kept = num_kept.minimum(limits)
    # A row that is not a number keeps no token; its choice is not used, but it must be one.
    last = (num_kept - 1).clamp(min=0)
    # Rounding may push a point to the very end, behind the last token that is kept.
    drawn = torch.searchsorted(cumulative, point * cumulative.gather(-1, last), right=True).minimum(last)
    return token_ids.gather(-1, drawn).where(scores[:, :1].isfinite(), _NOT_A_NUMBER).squeeze(-1)


def _columns(columns: Seq[Seq[float]], like: Tensor) -> tuple[Tensor, ...]:
    """Each list of n numbers as a tensor [n, 1]."""
    return torch.tensor(columns, dtype=like.dtype, device=like.device).unsqueeze(-1).unbind()
