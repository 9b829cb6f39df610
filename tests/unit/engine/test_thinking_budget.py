"""What a sequence writes whose thinking is bounded, whatever tokens its model chooses."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keye.worker.engine.sequence import Sequence
from keye.worker.engine.thinking_budget import ThinkingBudget, ThinkingTags
from keye.worker.results.thinking import part_text

Write = Callable[..., Sequence]


@pytest.fixture(scope="session")
def write(make_sequence: Callable[..., Sequence], tokenizer: Any) -> Write:
    """A sequence whose model chooses the tokens of these texts, token ids among them as they are."""

    def write(max_thinking_tokens: int | None, *chosen: str | int, **sampling: Any) -> Sequence:
        ids = [id for each in chosen for id in (tokenizer.encode(each) if isinstance(each, str) else [each])]
        asked = {"max_new_tokens": 500, "max_thinking_tokens": max_thinking_tokens, **sampling}
        sequence = make_sequence([0], eos_token_ids=(tokenizer.eos_token_id,), **asked)
        reasons = (sequence.append(token_id, now=0) for token_id in ids)
        sequence.end(next(filter(None, reasons), "abandoned"), now=1)
        return sequence

    return write


def text_of(sequence: Sequence) -> str:
    return sequence.pending.generated.text


@pytest.mark.parametrize(
    ("most", "shown"),
    [
        (0, "<think></think><answer>"),
        (1, "<think>a</think><answer>"),
        (4, "<think>a,a,</think><answer>"),
        (5, "<think>a,a,a</think>,a"),
        (6, "<think>a,a,a</think>,a"),
        (None, "<think>a,a,a</think>,a"),
    ],
)
def test_thinking_ends_after_so_many_tokens_and_not_before(write: Write, most: int | None, shown: str) -> None:
    written = text_of(write(most, "<think>a,a,a</think>,a"))
    assert written == shown if shown.endswith(",a") else written.startswith(shown)


def test_what_the_model_chooses_while_the_answer_is_begun_for_it_is_left_out(write: Write) -> None:
    # </think> and the three tokens of <answer> stand in place of four.
    assert text_of(write(2, "<think>a,", "....", "b,")) == "<think>a,</think><answer>b,"


def test_several_blocks_share_the_budget_and_one_behind_it_is_closed_at_once(write: Write) -> None:
    sequence = write(3, "<think>a,</think>", "b", "<think>c", "....", "<think>", "....", "e")
    assert text_of(sequence) == "<think>a,</think>b<think>c</think><answer><think></think><answer>e"
    assert part_text(text_of(sequence)) == (None, "a,\n\nc", "b\n\ne")


@pytest.mark.holds("docs/producers.md#whether-it-thinks-first", "behind the character that it is at")
@pytest.mark.parametrize(("most", "kept"), [(1, "猫"), (2, "猫"), (3, "猫"), (4, "猫狗"), (6, "猫狗")])
def test_a_character_that_is_begun_is_ended_first(write: Write, most: int, kept: str) -> None:
    """Of three tokens each."""
    assert text_of(write(most, "<think>猫狗鸟鱼", "....")).startswith(f"<think>{kept}</think><answer>")


def test_a_model_that_begins_characters_and_ends_none_is_not_waited_for(write: Write, tokenizer: Any) -> None:
    first, *_ = tokenizer.encode("猫")
    assert text_of(write(2, "<think>", first, first, "....", "b")) == "<think>\ufffd\ufffd</think><answer>b"
    tags = ThinkingTags.of(tokenizer)
    assert tags is not None
    budget = ThinkingBudget(tags, 1)
    # As if each token ended a character and began another.
    assert [budget.take(token_id, goes_on=True) for token_id in (tags.opening, *[7] * 5)][4:] == [7, tags.closing]


def test_thinking_that_would_end_with_the_answer_left_out_is_answered(write: Write, tokenizer: Any) -> None:
    sequence = write(1, "<think>a", tokenizer.eos_token_id, "...", "b", tokenizer.eos_token_id)
    assert text_of(sequence) == "<think>a</think><answer>b"
    assert sequence.pending.generated.finish_reason == "stop"


@pytest.mark.holds("docs/producers.md#whether-it-thinks-first", "They are part of `max_new_tokens`")
def test_no_end_is_written_past_max_new_tokens(write: Write, tokenizer: Any) -> None:
    sequence = write(2, "<think>a,", "....", "b", max_new_tokens=5)
    assert text_of(sequence) == f"<think>a,</think>{tokenizer.decode(ThinkingTags.of(tokenizer).ending[1])}"
    assert sequence.pending.generated.finish_reason == "length"


@pytest.mark.parametrize(("stop", "shown"), [("</think>", "<think>a,"), ("<answer>", "<think>a,</think>"), (">d", "")])
def test_stop_strings_end_what_is_written_for_the_model_as_well(write: Write, stop: str, shown: str) -> None:
    shown = shown or "<think>a,</think><answer"
    assert text_of(write(2, "<think>a,", "....", "d", stop=(stop,))) == shown


def test_deltas_are_the_text(write: Write) -> None:
    sequence = write(3, "<think>a猫....b")
    assert "".join(delta.text for delta in sequence.pending.deltas()) == text_of(sequence)


@settings(max_examples=300, deadline=None)
@given(
    most=st.integers(0, 6),
    chosen=st.lists(st.sampled_from(["<think>", "</think>", "a", ",", "猫", "<answer>", "</answer>"]), max_size=25),
)
def test_the_bound_holds_and_changes_nothing_within_it(
    write: Write, tokenizer: Any, most: int, chosen: list[str]
) -> None:
    opening, closing, _ = ThinkingTags.of(tokenizer)

    def num_thought(ids: tuple[int, ...]) -> int:
        is_open, num = False, 0
        for token_id in ids:
            num += is_open and token_id != closing
            is_open = token_id != closing and (is_open or token_id == opening)
        return num

    free, bounded = (write(each, *chosen).pending.generated.token_ids for each in (None, most))
    # A character of three tokens that the last one begins is ended.
    assert num_thought(bounded) <= most + 2
    if num_thought(free) <= most and "<think>" not in chosen[-1:]:
        assert bounded == free
