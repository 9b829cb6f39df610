"""The text of answers that have to fit a schema: what stands before them, and that nothing within is read as a tag."""

import json
import math
from itertools import pairwise
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keye.config.codes import ErrorCode
from keye.config.faults import Fault
from keye.worker.results.parsed_answer import parse_answer
from keye.worker.results.thinking import ThinkingSplitter, answer_form, part_text


@pytest.mark.parametrize(
    ("schema", "thinking", "form"),
    [(None, "auto", "free"), ({}, "no_think", "bare"), ("a", "think", "tagged"), (["a"], "auto", "tagged")],
)
def test_an_answer_is_tagged_where_thinking_may_stand_before_it(schema: Any, thinking: str, form: str) -> None:
    assert answer_form(schema, thinking) == form


@pytest.mark.parametrize(
    ("form", "written", "analysis", "reasoning", "answer"),
    [
        ("tagged", '<think>so</think><answer>{"a":"<think>"}', None, "so", '{"a":"<think>"}'),
        ("tagged", '<think>so</think><answer>{"a":"</answer> "}', None, "so", '{"a":"</answer> "}'),
        ("tagged", "<think>so</think><answer>42</answer>", None, "so", "42"),
        ("tagged", "<analysis>easy</analysis><answer> x \n", "easy", None, " x \n"),
        ("tagged", "<analysis>a</analysis><think>b</think><answer></answer></answer>", "a", "b", "</answer>"),
        ("tagged", "<think>not yet", None, "not yet", ""),
        ("tagged", "<answer>a</answ", None, None, "a</answ"),
        ("bare", " <think>text</think> ", None, None, " <think>text</think> "),
        ("bare", "x</answer>", None, None, "x</answer>"),
    ],
)
def test_once_an_answer_has_begun_nothing_is_a_tag_and_white_space_stays(
    form: Literal["bare", "tagged"], written: str, analysis: str | None, reasoning: str | None, answer: str
) -> None:
    assert part_text(written, form) == (analysis, reasoning, answer)


texts = st.text("<>/answerthik \n{}", max_size=40)
marks = st.sampled_from(["<answer>", "</answer>", "<think>", "</think>", "</ans", "<", " ", "{", "是"])


@settings(deadline=None)
@given(st.lists(marks | texts), st.lists(st.integers(0, 200)), st.sampled_from(["bare", "tagged"]))
def test_pieces_joined_do_not_depend_on_where_the_text_was_cut(
    parts: list[str], cuts: list[int], form: Literal["bare", "tagged"]
) -> None:
    written = "<think>so</think><answer>" * (form == "tagged") + "".join(parts)
    splitter = ThinkingSplitter(form)
    ends = [0, *sorted(min(cut, len(written)) for cut in cuts), len(written)]
    pieces = [piece for start, end in pairwise(ends) for piece in splitter.push(written[start:end])]
    answer = "".join(text for channel, text in [*pieces, *splitter.flush()] if channel == "answer")
    assert answer == part_text(written, form).answer
    assert answer == "".join(parts).removesuffix("</answer>" if form == "tagged" else "")


def test_parsed_is_what_the_json_says_or_the_text_that_fits() -> None:
    assert parse_answer({}, '{"红": [1, null, "😀"]}') == {"红": [1, None, "😀"]}
    assert parse_answer("[0-9]+", "007") == "007"
    assert parse_answer(["true"], "true") == "true"


@pytest.mark.parametrize("written", ["1e999", "-1e999", "9" * 5000, "[" + "-" + "9" * 5000 + "]"])
def test_numbers_beyond_a_float_can_still_be_stored(written: str) -> None:
    parsed = parse_answer({}, written)
    number = parsed[0] if isinstance(parsed, list) else parsed
    assert math.isfinite(number)
    assert json.loads(json.dumps(parsed, allow_nan=False)) == parsed


@pytest.mark.parametrize("levels", [101, 300, 100_000])
def test_what_is_nested_more_deeply_than_can_be_stored_fails_by_name(levels: int) -> None:
    with pytest.raises(Fault, match="more than 100 levels") as failed:
        parse_answer({}, "[" * levels + "]" * levels)
    assert failed.value.code is ErrorCode.ANSWER_INCOMPLETE
    assert parse_answer({}, "[" * 100 + "]" * 100)
