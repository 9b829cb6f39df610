"""Jobs whose answers have to fit a schema: what their results and their events say, and what is refused."""

import json
from typing import Any

import pytest

from keye.config.codes import ErrorCode
from keye.config.event import TextGenerated
from keye.config.faults import JobFailed
from keye.config.outcome import Answer, Unanswered
from keye.config.wire import seal
from tests.integration.analyze.plant import Plant, a_job
from tests.support.fitting import SCHEMAS, assert_fits

PLENTY = {"max_new_tokens": 80, "temperature": 1.0}


@pytest.mark.holds("docs/answers.md#answers-that-fit", "`parsed` is what the JSON says, or the text.")
@pytest.mark.parametrize("thinking", ["no_think", "think", "auto"])
@pytest.mark.parametrize("name", ["object", "Chinese", "any text", "choices"])
def test_parsed_says_what_the_answer_does_and_the_stream_says_it_as_it_comes(
    plant: Plant, name: str, thinking: str
) -> None:
    schema = SCHEMAS[name]
    job = plant.client.submit(
        a_job(response_schema=schema, thinking=thinking, generation={**PLENTY, "seed": 5, "max_thinking_tokens": 9})
    )
    result = plant.finish(job)
    assert_fits(schema, result.answer)
    assert result.parsed == (json.loads(result.answer) if isinstance(schema, dict) else result.answer)
    streamed = {"analysis": "", "reasoning": "", "answer": ""}
    for event in job.events():
        if isinstance(event, TextGenerated):
            assert event.offset == len(streamed[event.channel])
            streamed[event.channel] += event.text
    assert streamed == {
        "analysis": result.analysis or "",
        "reasoning": result.reasoning or "",
        "answer": result.answer,
    }
    assert result.finish_reason in ("stop", "length")


@pytest.mark.holds(
    "docs/answers.md#answers-that-fit",
    "One that cannot be closed fails with `ANSWER_INCOMPLETE`, which says what to raise.",
)
def test_tokens_that_do_not_suffice_fail_by_name(plant: Plant) -> None:
    job = plant.client.submit(a_job(response_schema=SCHEMAS["object"], generation={"max_new_tokens": 4}))
    failed = plant.fail(job)
    assert failed.code is ErrorCode.ANSWER_INCOMPLETE
    assert "Raise max_new_tokens" in str(failed)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "minimum": 5, "maximum": 1},
        "(a{1,1000}){1,1000}",
        "a{ 100000000 }",
        "(a?){9000}a{9000}",
        ["a"] * 2000,
        [],
        7,
        "",
        {"not": {}},
        "([a-z",
        {"const": "\x01"},
        {"$ref": "#a"},
        {"properties": [1], "required": {}},
    ],
)
def test_a_message_that_came_past_the_producer_is_refused_by_the_worker(plant: Plant, schema: Any) -> None:
    sealed = seal(a_job(response_schema=["yes"])).model_dump(mode="json")
    sealed["job"]["response_schema"] = schema
    with pytest.raises(JobFailed, match="response_schema") as failed:
        plant.send(sealed, sealed["job_id"]).get(timeout=30)
    assert failed.value.code is ErrorCode.INVALID_JOB


def test_each_question_and_each_sample_fits_its_own_schema_and_one_that_cannot_costs_the_others_nothing(
    plant: Plant,
) -> None:
    questions = [
        {"prompt": "which?", "response_schema": ["red", "blue"], "generation": {**PLENTY, "n": 3}},
        {"prompt": "how many?", "response_schema": {"type": "integer", "minimum": 1, "maximum": 9}},
        {"prompt": "say it all", "response_schema": SCHEMAS["object"], "generation": {"max_new_tokens": 4}},
        {"prompt": "and?"},
    ]
    result = plant.finish(plant.client.submit(questions=questions, generation=PLENTY, thinking="no_think"))
    by_question = [[each for each in result.answers if each.question == number] for number in range(4)]
    assert len(by_question[0]) == 3
    for sample in by_question[0]:
        assert isinstance(sample, Answer)
        assert sample.parsed == sample.answer
        assert sample.answer in ("red", "blue")
    (counted,), (failed,), (free,) = by_question[1:]
    assert isinstance(counted, Answer)
    assert counted.parsed in range(1, 10)
    assert isinstance(failed, Unanswered)
    assert failed.code is ErrorCode.ANSWER_INCOMPLETE
    assert isinstance(free, Answer)
    assert free.parsed is None
    assert result.parsed == by_question[0][0].parsed


@pytest.mark.holds(
    "docs/answers.md#samples-probabilities-a-least-length",
    "`min_tokens` lets nothing end an answer before so many tokens are written",
)
def test_min_tokens_hold_nothing_up_that_is_complete(plant: Plant) -> None:
    generation = {**PLENTY, "min_tokens": 60, "logprobs": True}
    for thinking in ("no_think", "auto"):
        for schema in (["red", "blue"], {"type": "object"}, r"\d{4}"):
            result = plant.finish(
                plant.client.submit(a_job(response_schema=schema, generation=generation, thinking=thinking))
            )
            assert_fits(schema, result.answer)
            assert result.logprobs is not None
            assert len(result.logprobs) == result.usage.completion_tokens
