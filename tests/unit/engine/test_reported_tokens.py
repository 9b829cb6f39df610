"""What is told of the tokens that are written, and how many are written at least."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keye.worker.engine.detokenizer import StopStrings
from keye.worker.engine.sampler import Sampler
from keye.worker.engine.sequence import Sequence

MakeSequence = Callable[..., Sequence]
VOCAB = 50


def random_logits(rows: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def step(sampler: Sampler, logits: torch.Tensor, sequences: list[Sequence]) -> list[int | None]:
    chosen = sampler.choose(logits, sequences)
    for sequence, token_id in zip(sequences, chosen, strict=True):
        if token_id is not None and sequence.append(token_id, 0):
            sequence.end("length", 0)
    return chosen


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7, "top_k": 5, "seed": 2}, {"repetition_penalty": 1.5}, {"min_tokens": 4}]
)
def test_logprobs_are_the_models_own_before_all_options(make_sequence: MakeSequence, options: dict[str, Any]) -> None:
    asked = [make_sequence([1, 7], max_new_tokens=4, logprobs=True, eos_token_ids=(3,), **options) for _ in range(2)]
    silent = make_sequence([1, 7], max_new_tokens=4)
    sampler, expected = Sampler(), [[], []]
    for seed in range(4):
        logits = random_logits(3, seed)
        logits[:, 3] = 30  # it would end at once
        logits = logits if options.get("min_tokens") else logits[:, [*range(3), 0, *range(4, VOCAB)]]
        chosen = step(sampler, logits, [asked[0], silent, asked[1]])
        for told, row in zip(expected, (0, 2), strict=True):
            told.append(float(logits[row].log_softmax(-1)[chosen[row]]))
    for sequence, told in zip(asked, expected, strict=True):
        assert len(sequence.pending.generated.token_ids) == 4
        assert sequence.pending.generated.logprobs == pytest.approx(told)
    assert silent.pending.generated.logprobs == ()


def test_a_token_written_in_place_of_the_chosen_one_has_its_own_logprob(
    make_sequence: MakeSequence, tokenizer: Any
) -> None:
    opening, closing = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    sequence = make_sequence([1], max_new_tokens=3, max_thinking_tokens=0, logprobs=True)
    sampler, expected = Sampler(), []
    for chosen in (opening, 5, 6):
        logits = torch.randn(1, len(tokenizer), generator=torch.Generator().manual_seed(chosen))
        logits[0, chosen] = 20
        assert step(sampler, logits, [sequence]) == [chosen]
        sampler.forget_batch()
        expected.append(float(logits[0].log_softmax(-1)[sequence.generated_ids[-1]]))
    assert sequence.generated_ids[:2] == [opening, closing]
    assert sequence.pending.generated.logprobs == pytest.approx(expected)


def test_a_logprob_is_a_number_whatever_was_written(make_sequence: MakeSequence) -> None:
    logits = torch.full((1, VOCAB), -torch.inf)
    logits[0, 4] = 1
    sequence = make_sequence([1], logprobs=True)
    Sampler().choose(logits, [sequence])
    assert sequence.logprob_of is not None
    assert sequence.logprob_of(4) == 0
    assert -torch.inf < sequence.logprob_of(5) < -1e30
    overflowed = make_sequence([1], logprobs=True, min_tokens=1, eos_token_ids=(5,))
    logits[0, 5] = torch.inf
    assert Sampler().choose(logits, [overflowed]) == [4]
    assert overflowed.logprob_of is not None
    assert -torch.inf < overflowed.logprob_of(4) < -1e30


def test_a_step_tried_again_for_want_of_memory_draws_what_it_would_have_drawn(
    make_sequence: MakeSequence, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"temperature": 2.0, "seed": 3, "repetition_penalty": 1.5, "max_new_tokens": 20, "logprobs": True}
    calm, short = (make_sequence([1], **options) for _ in range(2))
    expected, sampler = Sampler(), Sampler()
    for seed in range(10):
        logits = random_logits(1, seed)
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "log_softmax", raise_out_of_memory)
            with pytest.raises(torch.OutOfMemoryError):
                sampler.choose(logits, [short])
        assert step(sampler, logits, [short]) == step(expected, logits, [calm])


def raise_out_of_memory(*_: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 1}, {"repetition_penalty": 1.2}])
def test_no_end_token_is_chosen_before_so_many_tokens(make_sequence: MakeSequence, options: dict[str, Any]) -> None:
    ends = (3, 9, VOCAB + 7)
    logits = random_logits(1)
    logits[0, [3, 9]] = 1000
    for least in range(4):
        sequence = make_sequence([1], max_new_tokens=20, min_tokens=least, eos_token_ids=ends, **options)
        sampler = Sampler()
        while not sequence.pending.has_ended:
            (token_id,) = sampler.choose(logits, [sequence])
            assert token_id is not None
            if sequence.append(token_id, 0):
                sequence.end("stop", 0)
        written = sequence.pending.generated.token_ids
        assert len(written) == least + 1
        assert written[-1] in ends
        assert not {*written[:-1]} & {*ends}


def test_who_must_go_on_costs_those_beside_it_nothing(make_sequence: MakeSequence) -> None:
    logits = random_logits(2)
    logits[:, 3] = 1000
    bound, free = (make_sequence([1], min_tokens=least, eos_token_ids=(3,)) for least in (2, 0))
    before = logits.clone()
    chosen = Sampler().choose(logits, [bound, free])
    assert chosen[0] != 3
    assert chosen[1] == 3
    assert logits.equal(before)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text("ab", max_size=4), max_size=8),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.integers(0, 8),
)
def test_a_stop_string_that_is_complete_too_early_is_text(pieces: list[str], stops: list[str], least: int) -> None:
    strings = StopStrings(stops)
    shown = text = ""
    early = len("".join(pieces[: max(least - 1, 0)]))
    for written, piece in enumerate(pieces, 1):
        text += piece
        shown += strings.push(piece, may_stop=written >= least)
        if strings.is_hit:
            break
    shown += strings.flush()
    ends = [end for end in range(early + 1, len(text) + 1) if text[:end].endswith(tuple(stops))]
    assert strings.is_hit == bool(ends)
    begun = min((end - len(stop) for end in ends for stop in stops if text[:end].endswith(stop)), default=len(text))
    assert shown == text[:begun]


def test_an_answer_goes_on_over_stop_strings_up_to_its_least_tokens(
    make_sequence: MakeSequence, tokenizer: Any
) -> None:
    ids = tokenizer.encode("one stop two stop three", add_special_tokens=False)
    sequence = make_sequence([1], max_new_tokens=99, stop=(" stop",))
    least = next(n for n in range(len(ids)) if "two" in tokenizer.decode(ids[:n]))
    sequence.pending.sampling = replace(sequence.pending.sampling, min_tokens=least)
    for token_id in ids:
        if sequence.append(token_id, 0):
            sequence.end("stop", 0)
            break
    assert sequence.pending.generated.text == "one stop two"
