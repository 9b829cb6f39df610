"""Which token is chosen, against the processors of transformers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from keye.worker.engine.sampler import Sampler
from keye.worker.engine.sequence import Sequence

MakeSequence = Callable[..., Sequence]
VOCAB = 50


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(1)) * 3


def test_greedy_takes_the_best(make_sequence: MakeSequence, logits: Tensor) -> None:
    assert Sampler().choose(logits.unsqueeze(0), [make_sequence([1])]) == [int(logits.argmax())]


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-45, 1e-38, 1e-9])
def test_a_temperature_too_small_to_divide_by_is_greedy(
    make_sequence: MakeSequence, logits: Tensor, temperature: float
) -> None:
    sequences = [make_sequence([1], temperature=temperature, seed=seed) for seed in range(20)]
    best = [int(logits.argmax())] * 20
    assert Sampler().choose(logits.repeat(20, 1), sequences) == best
    # Beside one that draws, and as large as logits of float16 can be.
    drawing = make_sequence([1], temperature=1.0, seed=0)
    assert Sampler().choose(logits.repeat(21, 1) * 5000, [*sequences, drawing])[:20] == best


@pytest.mark.parametrize("penalty", [5e-324, 1e-300, 1e-45, 1e-38, 1e-9])
@pytest.mark.parametrize("temperature", [0.0, 1e-5, 1.0])
def test_a_penalty_too_small_to_divide_by_puts_what_was_seen_first(
    make_sequence: MakeSequence, logits: Tensor, penalty: float, temperature: float
) -> None:
    seen = int((logits > 0).nonzero()[0])
    sequence = make_sequence([seen], repetition_penalty=penalty, temperature=temperature, seed=0)
    assert Sampler().choose(logits.unsqueeze(0) * 5000, [sequence]) == [seen]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.6, "top_p": 0.95, "top_k": 20},
        {"temperature": 1.0, "top_p": 0.5, "top_k": 0},
        {"temperature": 1.7, "top_p": 1.0, "top_k": 5},
        {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.4},
    ],
)
def test_tokens_are_drawn_as_often_as_transformers_would(
    make_sequence: MakeSequence, logits: Tensor, options: dict[str, Any]
) -> None:
    prompt, num_draws = [3, 3, int(logits.argmax())], 4000
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(options.get("repetition_penalty", 1.0))])
    processors.append(TemperatureLogitsWarper(options["temperature"]))
    if options["top_k"]:
        processors.append(TopKLogitsWarper(options["top_k"]))
    processors.append(TopPLogitsWarper(options["top_p"]))
    expected = processors(torch.tensor([prompt]), logits.unsqueeze(0).clone()).softmax(dim=-1)[0]

    sequences = [make_sequence(prompt, seed=seed, **options) for seed in range(num_draws)]
    chosen = Sampler().choose(logits.expand(num_draws, -1), sequences)
    drawn = torch.bincount(torch.tensor(chosen), minlength=VOCAB) / num_draws
    assert not drawn[expected == 0].any()
    assert (drawn - expected).abs().max() < 4 * (0.25 / num_draws) ** 0.5


def test_penalty_counts_what_was_generated_too(make_sequence: MakeSequence) -> None:
    sampler, sequence = Sampler(), make_sequence([0], repetition_penalty=2.0)
    logits = torch.tensor([[0.0, 3.0, 2.0, -1.0]])
    assert [sampler.choose(logits, [sequence])[0] for _ in range(3)] == [1, 2, 1]


def test_penalty_counts_what_was_generated_beside_others(make_sequence: MakeSequence) -> None:
    sampler, first, other = Sampler(), make_sequence([0], repetition_penalty=2.0), make_sequence([3])
    logits = torch.tensor([[0.0, 3.0, 2.0, -1.0]])
    chosen = []
    for beside in ([], [other], []):
        chosen.append(sampler.choose(logits.expand(1 + len(beside), -1), [*beside, first])[-1])
        first.generated_ids.append(chosen[-1])
    assert chosen == [1, 2, 1]


def test_draw_depends_on_the_seed_and_not_on_the_neighbours(make_sequence: MakeSequence, logits: Tensor) -> None:
    options: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 0.9, "seed": 11}
    alone = make_sequence([1], **options)
    drawn_alone = [Sampler().choose(logits.unsqueeze(0), [alone])[0] for _ in range(20)]
    beside = make_sequence([1], **options)
    others = [make_sequence([1], temperature=0.5, top_k=3), make_sequence([1]), make_sequence([1], temperature=1.5)]
    rows = torch.stack([logits.flip(0), logits, logits * 2, logits])
    drawn_beside = [Sampler().choose(rows, [others[0], beside, *others[1:]])[1] for _ in range(20)]
    assert drawn_alone == drawn_beside
    assert len(set(drawn_alone)) > 1


def test_row_that_is_not_a_number_is_told_apart(make_sequence: MakeSequence, logits: Tensor) -> None:
    bad = logits.clone()
    bad[4] = torch.nan
    sequences = [make_sequence([1]), make_sequence([1], temperature=0.7), make_sequence([1], repetition_penalty=2.0)]
    rows = torch.stack([bad, bad, bad, logits])
    assert Sampler().choose(rows, [*sequences, make_sequence([1])]) == [None, None, None, int(logits.argmax())]
