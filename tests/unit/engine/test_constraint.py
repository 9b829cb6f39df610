"""Answers that have to fit a schema, written by a model that chooses any token it may: all fit, however few it has."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keye.config.codes import ErrorCode
from keye.config.faults import Fault, InvalidJob
from keye.config.job import AnalysisJob
from keye.worker.engine.constraint import Constraint, Vocabulary
from keye.worker.engine.detokenizer import Detokenizer
from keye.worker.engine.thinking_budget import ThinkingBudget, ThinkingTags
from keye.worker.model.processor import KeyeProcessor
from keye.worker.results.thinking import answer_form, part_text
from tests.support.fitting import SCHEMAS, assert_fits

CHECKPOINT = Path(__file__).parents[2] / "golden" / "preview" / "checkpoint"
PROCESSOR = KeyeProcessor.from_checkpoint(CHECKPOINT)
TOKENIZER = PROCESSOR.tokenizer
MODES = ("no_think", "think", "auto")


def allowed(constraint: Constraint) -> list[int]:
    bits = np.unpackbits(np.frombuffer(constraint.matcher.compute_bitmask(), np.uint8), bitorder="little")
    return np.flatnonzero(bits).tolist()


def write(constraint: Constraint, max_new_tokens: int, rng: random.Random, budget: ThinkingBudget | None = None) -> str:
    """What comes of it where each token that is allowed is as likely, but the end less so. Raises its fault."""
    text, taken = Detokenizer(Vocabulary.of(PROCESSOR).token_bytes), []
    written = ""
    while len(taken) < max_new_tokens:
        may_be = allowed(constraint)
        assert may_be, "a model cannot choose nothing"
        assert max(may_be) < len(TOKENIZER), "an id without a token"
        token_id = rng.choice(may_be)
        if budget is not None:
            token_id = budget.take(token_id, goes_on=text.goes_on(token_id))
        taken.append(constraint.take(token_id, max_new_tokens - len(taken)))
        written += text.push(taken[-1])
        if constraint.is_complete or taken[-1] in PROCESSOR.eos_token_ids:
            break
    if fault := constraint.fault(has_ended=True):
        raise fault
    return written + text.flush()


def answer_of(written: str, schema: Any, mode: str) -> str:
    return part_text(written, answer_form(schema, mode)).answer


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SCHEMAS)
def test_whatever_is_chosen_fits_in_any_mode_within_any_number_of_tokens(name: str, mode: str) -> None:
    schema = SCHEMAS[name]
    rng = random.Random(f"{name} {mode}")
    for seed in range(6):
        max_new_tokens = rng.choice([20, 32, 64, 200])
        if max_new_tokens == 20 and mode != "no_think":
            max_new_tokens = 26
        constraint = Constraint.of(PROCESSOR, schema, mode, max_new_tokens)
        tags = Vocabulary.of(PROCESSOR).tags
        budget = ThinkingBudget(tags, 5) if tags and seed % 2 else None
        written = write(constraint, max_new_tokens, rng, budget)
        assert_fits(schema, answer_of(written, schema, mode))
        assert written.startswith("<think>") or mode != "think"


def bounded(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    names = st.sampled_from(["a", "b", "名", "key with space", "</answer>"])
    objects = st.builds(
        lambda properties, required, others: {
            "type": "object",
            "properties": properties,
            "required": [name for name in required if name in properties],
            "additionalProperties": others,
        },
        st.dictionaries(names, inner, max_size=4),
        st.lists(names, unique=True),
        st.booleans(),
    )
    arrays = st.builds(
        lambda items, least, more: {"type": "array", "items": items, "minItems": least, "maxItems": least + more},
        inner,
        st.integers(0, 3),
        st.integers(0, 3),
    )
    return objects | arrays | st.builds(lambda ways: {"anyOf": ways}, st.lists(inner, min_size=1, max_size=3))


numbers = st.builds(
    lambda kind, least, more: {"type": kind, "minimum": least, "maximum": least + more},
    st.sampled_from(["integer", "number"]),
    st.integers(-1000, 1000),
    st.integers(0, 1000),
)
texts = st.builds(
    lambda least, more: {"type": "string", "minLength": least, "maxLength": least + more},
    st.integers(0, 20),
    st.integers(0, 20),
)
values = st.none() | st.booleans() | st.integers(-99, 99) | st.text('ab<>/"\\{}é是😀', max_size=5)
leaves = numbers | texts | st.builds(lambda each: {"enum": each}, st.lists(values, min_size=1, max_size=4))
leaves |= st.sampled_from([{"type": "boolean"}, {"type": "null"}, {}, {"type": "string", "format": "date"}])
leaves |= st.sampled_from([{"type": "string", "pattern": p} for p in ("^a+b$", "x[0-9]{2}y", "^(是|😀){2}$")])


@settings(deadline=None, max_examples=100)
@given(st.recursive(leaves, bounded, max_leaves=6), st.integers(8, 200), st.sampled_from(MODES), st.randoms())
def test_random_schemas_are_fulfilled_or_fail_by_name(
    schema: Any, max_new_tokens: int, mode: str, rng: random.Random
) -> None:
    try:
        AnalysisJob(prompt="what?", response_schema=schema)
    except InvalidJob:
        return
    outcome: str | Fault
    try:
        constraint = Constraint.of(PROCESSOR, schema, mode, max_new_tokens)
        outcome = write(constraint, max_new_tokens, rng)
    except Fault as fault:
        outcome = fault
    if isinstance(outcome, str):
        assert_fits(schema, answer_of(outcome, schema, mode))
    else:
        assert outcome.code is ErrorCode.ANSWER_INCOMPLETE
        assert "max_new_tokens" in str(outcome)


def test_an_answer_that_cannot_go_on_is_complete_at_once() -> None:
    for schema, text in ((["yes", "no"], "no"), ({"type": "object"}, "{}"), ({"const": 5}, "5"), ("[ab]{3}", "aab")):
        constraint = Constraint.of(PROCESSOR, schema, "no_think", 20)
        *first, last = TOKENIZER.encode(text)
        for token_id in first:
            assert constraint.take(token_id, 20) == token_id
            assert not constraint.is_complete
        constraint.take(last, 20)
        assert constraint.is_complete
        assert not constraint.has_cut


def test_special_tokens_are_written_in_no_answer_but_their_letters_may_be() -> None:
    schema = {"type": "string"}
    constraint = Constraint.of(PROCESSOR, schema, "no_think", 100)
    constraint.take(TOKENIZER.encode('"')[0], 100)
    special = [*TOKENIZER.all_special_ids, *TOKENIZER.convert_tokens_to_ids(["<think>", "</think>"])]
    assert not {*allowed(constraint)} & {*special}
    for letter in "<think></answer><|im_end|>":
        (token_id,) = TOKENIZER.encode(letter)
        assert token_id in allowed(constraint)
        constraint.take(token_id, 100)
    assert constraint.fault(has_ended=False) is None


def test_too_few_tokens_for_any_answer_are_refused_before_one_is_written() -> None:
    with pytest.raises(Fault, match=r"takes \d+ tokens, max_new_tokens is 3\. Raise max_new_tokens") as refused:
        Constraint.of(PROCESSOR, SCHEMAS["object"], "no_think", 3)
    assert refused.value.code is ErrorCode.ANSWER_INCOMPLETE


@pytest.mark.parametrize("regex", ["(?s).*</answer>.*", "[^<]*(</answer>)?", "a+|</answer>", "(?s).*"])
def test_a_text_that_may_hold_the_tag_that_closes_it_fits_as_it_is_told(regex: str) -> None:
    for seed in range(20):
        constraint = Constraint.of(PROCESSOR, regex, "think", 60)
        written = write(constraint, 60, random.Random(seed))
        assert_fits(regex, answer_of(written, regex, "think"))


def test_a_text_that_can_only_end_with_the_tag_that_closes_it_fails_by_name() -> None:
    with pytest.raises(Fault, match="Raise max_new_tokens") as refused:
        Constraint.of(PROCESSOR, "</answer>", "think", 60)
    assert refused.value.code is ErrorCode.ANSWER_INCOMPLETE


def test_white_space_has_an_end() -> None:
    constraint = Constraint.of(PROCESSOR, SCHEMAS["object"], "no_think", 1000)
    space = {*TOKENIZER.encode(" "), *TOKENIZER.encode("\n")}
    constraint.take(TOKENIZER.encode("{")[0], 1000)
    num_spaces = 0
    while may_be := {*allowed(constraint)} & space:
        constraint.take(max(may_be), 1000)
        num_spaces += 1
    assert num_spaces < 40


def test_copies_go_their_own_ways() -> None:
    one = Constraint.of(PROCESSOR, ["yes", "no"], "no_think", 10)
    other = one.copy()
    for token_id in TOKENIZER.encode("yes"):
        one.take(token_id, 10)
    assert one.is_complete
    assert not other.is_complete
    for token_id in TOKENIZER.encode("no"):
        other.take(token_id, 10)
    assert other.is_complete


@pytest.mark.parametrize("mode", MODES)
def test_a_model_whose_tags_are_plain_text_writes_what_fits_too(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ThinkingTags, "of", classmethod(lambda cls, tokenizer: None))
    vocabulary = Vocabulary(PROCESSOR)
    for seed in range(10):
        constraint = Constraint(["yes", "no"], mode, vocabulary, 60)
        written = write(constraint, 60, random.Random(seed))
        assert answer_of(written, ["yes", "no"], mode) in ("yes", "no")
