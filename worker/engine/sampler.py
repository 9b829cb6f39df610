"""Chooses the next token of every sequence at once. What a sequence draws does not depend on who runs beside it."""

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from worker.engine.sequence import Sequence


class Sampler:
    """Keeps, for sequences with a repetition penalty, which tokens they have seen."""

    def __init__(self) -> None:
        self._seen: dict[Sequence, Tensor] = {}

    def choose(self, logits: Tensor, sequences: Seq[Sequence]) -> list[int | None]:
        """The next token for each row of `logits` [n, V]; None for a row with a logit that is not a number.

        As in transformers: repetition penalty, temperature, top-k, top-p. The draw is by the sequence's own generator.
        """
        logits = self._penalised(logits.float(), sequences)
        best_logits, best = logits.max(dim=-1)
        chosen: list[int | None] = best.tolist()
        sampled = [row for row, sequence in enumerate(sequences) if sequence.pending.sampling.temperature > 0]
        if sampled:
            drawing = [sequences[row] for row in sampled]
            for row, drawn in zip(sampled, _draw(logits[sampled], drawing), strict=True):
                chosen[row] = drawn
        finite: list[bool] = best_logits.isfinite().tolist()
        for row, (sequence, token_id) in enumerate(zip(sequences, chosen, strict=True)):
            if not finite[row]:
                chosen[row] = None
            elif sequence in self._seen:
                self._seen[sequence][token_id] = True
        return chosen

    def forget(self, sequence: Sequence) -> None:
        self._seen.pop(sequence, None)

    def _penalised(self, logits: Tensor, sequences: Seq[Sequence]) -> Tensor:
        rows = [row for row, sequence in enumerate(sequences) if sequence.pending.sampling.repetition_penalty != 1]
        if not rows:
            return logits
        seen = torch.stack([self._seen_by(sequences[row], logits) for row in rows])
        penalty = _column([sequences[row].pending.sampling.repetition_penalty for row in rows], logits)
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


def _draw(logits: Tensor, sequences: Seq[Sequence]) -> list[int]:
    options = [sequence.pending.sampling for sequence in sequences]
    scores = logits / _column([option.temperature for option in options], logits)
    vocab_size = logits.shape[-1]
    top_k = [min(option.top_k or vocab_size, vocab_size) for option in options]
    scores, token_ids = scores.topk(max(top_k), dim=-1)
    ranks = torch.arange(scores.shape[-1], device=logits.device)
    in_top_k = ranks < _column(top_k, logits)
    probabilities = scores.masked_fill(~in_top_k, -torch.inf).softmax(dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    in_top_p = cumulative - probabilities < _column([option.top_p for option in options], logits)
    # A row without a number keeps no token; its choice is not used, but it must be one.
    last = (in_top_k & in_top_p).sum(dim=-1, keepdim=True).sub_(1).clamp_(min=0)
    # Drawn on the host, a number a token, so that a seed gives the same text on every device and after a put-back.
    points = _column([sequence.rng.random() for sequence in sequences], logits) * cumulative.gather(-1, last)
    # Rounding may push a point to the very end, behind the last token that is left.
    drawn = torch.searchsorted(cumulative, points, right=True).minimum(last)
    return token_ids.gather(-1, drawn).squeeze(-1).tolist()


def _column(values: Seq[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(-1)
