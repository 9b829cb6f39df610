"""What a reader sees of a growing sequence: whole characters, no special tokens, nothing of a stop string."""

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keye.worker.engine.detokenizer import Detokenizer, StopStrings, TokenBytes
from keye.worker.engine.sequence import Sequence


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_text_of_tokens_one_by_one_is_the_tokenizers_text_of_the_whole(
    tokenizer: Any, token_bytes: TokenBytes, data: st.DataObject
) -> None:
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=40))
    detokenizer = Detokenizer(token_bytes)
    text = "".join([*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()])
    assert text == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    "text", ["naïve café", "视频里有一只猫。", "😀👍🏽 done", "<think>why</think><answer>42</answer>"]
)
def test_characters_of_several_tokens_are_shown_whole(tokenizer: Any, token_bytes: TokenBytes, text: str) -> None:
    detokenizer = Detokenizer(token_bytes)
    pieces = [detokenizer.push(token_id) for token_id in tokenizer.encode(text)]
    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_tokens_beyond_the_tokenizer_are_no_text(tokenizer: Any, token_bytes: TokenBytes) -> None:
    assert Detokenizer(token_bytes).push(len(tokenizer) + 3) == ""


pieces = st.lists(st.text("abc", max_size=4), max_size=20)


@settings(max_examples=500)
@given(pieces=pieces, stop=st.text("abc", min_size=1, max_size=5))
def test_text_is_cut_before_the_stop_string_however_it_arrives(pieces: list[str], stop: str) -> None:
    stop_strings = StopStrings([stop])
    shown = ""
    for piece in pieces:
        shown += stop_strings.push(piece)
        assert stop not in shown
        if stop_strings.is_hit:
            break
    else:
        shown += stop_strings.flush()
    whole = "".join(pieces)
    assert stop_strings.is_hit == (stop in whole)
    assert shown == whole.partition(stop)[0]


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    stop_strings = StopStrings(["\n\nHuman:", "END"])
    assert stop_strings.push("an EN") == "an "
    assert stop_strings.push("D") == ""
    assert stop_strings.is_hit


def test_what_is_held_back_is_the_longest_beginning_of_a_stop_string() -> None:
    draw = random.Random(7)
    for _ in range(2000):
        stops = ["".join(draw.choices("ab", k=draw.randint(1, 6))) for _ in range(draw.randint(1, 3))]
        stop_strings, text, shown = StopStrings(stops), "", ""
        for _ in range(12):
            text += (piece := "".join(draw.choices("ab", k=draw.randint(0, 4))))
            shown += stop_strings.push(piece)
            if starts := [text.find(stop) for stop in stops if stop in text]:
                assert stop_strings.is_hit
                assert shown == text[: min(starts)]
                break
            beginnings = [
                stop[:length] for stop in stops for length in range(len(stop)) if text.endswith(stop[:length])
            ]
            assert shown == text[: len(text) - max(map(len, beginnings))]
            assert not stop_strings.is_hit


def test_first_of_several_stop_strings_cuts() -> None:
    stop_strings = StopStrings(["two", "one"])
    assert stop_strings.push("zero one two") == "zero "


@pytest.mark.parametrize(
    ("ids", "reasons"),
    [
        ([7], ["stop"]),
        ([5, 5, 9], [None, None, "stop"]),
        ([5, 5, 5], [None, None, "length"]),
    ],
)
def test_either_end_token_stops_and_the_limit_ends_by_length(
    make_sequence: Callable[..., Sequence], ids: list[int], reasons: list[str | None]
) -> None:
    sequence = make_sequence([0], eos_token_ids=(7, 9), max_new_tokens=3)
    assert [sequence.append(token_id, now=0) for token_id in ids] == reasons


def test_text_held_back_for_a_stop_string_is_shown_at_the_end(
    make_sequence: Callable[..., Sequence], tokenizer: Any
) -> None:
    ids = tokenizer.encode("so EN")
    sequence = make_sequence([0], stop=("END",), max_new_tokens=len(ids))
    reasons = [sequence.append(token_id, now=0) for token_id in ids]
    sequence.end(reasons[-1] or "abandoned", now=1)
    assert sequence.pending.generated.text == "so EN"
    assert sequence.pending.generated.finish_reason == "length"
    assert "".join(delta.text for delta in sequence.pending.deltas()) == "so EN"
