"""Jobs of many questions and samples: what may be asked together, and that each question is a job of its own."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keye.config.contract import version_needed
from keye.config.faults import InvalidJob
from keye.config.job import (
    MAX_ANSWERS,
    MAX_LOGPROBS,
    MAX_TEXT_BYTES,
    AnalysisJob,
    GenerationOptions,
    Question,
    Thinking,
)
from keye.config.wire import fingerprint_of, kind_of, open_sealed, seal

PICTURE = {"type": "image", "uri": "/a.png"}

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
options = st.fixed_dictionaries(
    {}, optional={"max_new_tokens": st.integers(20, 99), "min_tokens": st.integers(0, 20), "seed": st.integers(0, 9)}
)
unsaid = st.fixed_dictionaries({}, optional={"thinking": st.sampled_from([*Thinking]), "generation": options})
questions = st.lists(
    texts | st.builds(lambda prompt, rest: {"prompt": prompt, **rest}, texts, unsaid), min_size=1, max_size=4
)
shared = st.sampled_from([{}, {"media": [PICTURE]}])
chats = st.sampled_from([[{"role": "user", "content": [part]}] for part in (PICTURE, {"type": "text", "text": "s"})])


@settings(deadline=None)
@given(questions, shared | st.builds(lambda messages: {"messages": messages}, chats), unsaid)
def test_each_question_is_what_a_job_of_its_own_would_ask(asked: list[Any], about: dict[str, Any], rest: Any) -> None:
    job = AnalysisJob(questions=asked, **about, **rest)
    for question, alone in zip(asked, job.by_question(), strict=True):
        own = {"prompt": question} if isinstance(question, str) else question
        said = {**rest, **own}
        if "generation" in own:
            said["generation"] = {**rest.get("generation", {}), **own["generation"]}
        if "messages" in about:
            (turn,) = about["messages"]
            content = (
                turn["content"] if isinstance(turn["content"], list) else [{"type": "text", "text": turn["content"]}]
            )
            turn = {"role": "user", "content": [*content, {"type": "text", "text": said.pop("prompt")}]}
            assert alone == AnalysisJob(messages=[turn], **said)
        else:
            assert alone == AnalysisJob(**about, **said)
    assert version_needed(job) == 2
    assert open_sealed(json.loads(seal(job).model_dump_json())).job == job
    assert fingerprint_of(job) != fingerprint_of(job.by_question()[0])


def test_a_job_of_one_question_is_sent_as_before() -> None:
    sent = json.loads(seal(AnalysisJob(prompt="?")).model_dump_json())
    assert sent["schema_version"] == 1
    assert not {"questions", "response_schema"} & sent["job"].keys()
    assert not {"n", "min_tokens", "logprobs"} & sent["job"]["generation"].keys()
    job = AnalysisJob(messages=[{"role": "user", "content": "?"}])
    assert job.by_question() == (job,)


def test_a_job_is_of_the_kind_of_all_its_new_tokens() -> None:
    eight = AnalysisJob(questions=["?"] * 8, generation={"max_new_tokens": 64})
    assert kind_of(eight) == kind_of(AnalysisJob(prompt="?", generation={"max_new_tokens": 512}))
    assert kind_of(eight) == kind_of(AnalysisJob(prompt="?", generation={"max_new_tokens": 64, "n": 8}))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"questions": ["?"], "prompt": "?"}, "job: give either prompt or questions"),
        ({}, "job: give either prompt or questions"),
        ({"questions": [], "media": [PICTURE]}, "job: give either prompt or questions"),
        (
            {"questions": ["?"], "messages": [{"role": "user", "content": "?"}], "media": [PICTURE]},
            "job: with messages",
        ),
        ({"questions": ["?", ""]}, "questions.1.prompt: "),
        ({"questions": [3]}, "questions.0: Input should be an object, not a number"),
        ({"questions": ["?"] * (MAX_ANSWERS + 1)}, f"questions: has more than {MAX_ANSWERS} items"),
        ({"questions": ["?"] * 5, "generation": {"n": 16}}, "job: 80 answers (questions x n), a job may have 64"),
        ({"questions": [{"prompt": "?", "generation": {"n": 17}}]}, "questions.0.generation.n: "),
        (
            {"questions": [{"prompt": "?", "generation": {"min_tokens": 9, "max_new_tokens": 8}}]},
            "questions.0.generation: min",
        ),
        ({"prompt": "?", "generation": {"n": 2, "temperature": 0}}, "generation: n 2 of a greedy answer"),
        (
            {"questions": ["x" * MAX_TEXT_BYTES, "y"]},
            f"job: prompt, messages, questions, schemas and stop are {MAX_TEXT_BYTES + 1}",
        ),
        (
            {"prompt": "?", "generation": {"logprobs": True, "n": 2, "max_new_tokens": MAX_LOGPROBS // 2 + 1}},
            f"job: logprobs of {MAX_LOGPROBS + 2} tokens",
        ),
    ],
)
def test_what_cannot_be_asked_together_is_told_with_its_place(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidJob) as refused:
        AnalysisJob(**fields)
    assert told in str(refused.value)
    asked = [{"prompt": each} if isinstance(each, str) else each for each in fields.get("questions", ())]
    sealed = {"schema_version": 2, "job_id": "1", "submitted_at": 0, "job": {**fields, "questions": asked}}
    with pytest.raises(InvalidJob) as by_a_worker:
        open_sealed(sealed)
    assert told in str(by_a_worker.value)


def test_what_a_question_says_itself_holds_wherever_the_job_is_read() -> None:
    general = {"n": 3, "temperature": 0.7, "seed": 5, "logprobs": True}
    own = {"n": 1, "max_new_tokens": 400, "logprobs": False}
    job = AnalysisJob(questions=["a", {"prompt": "b", "generation": own}], generation=general)
    read = open_sealed(json.loads(seal(job).model_dump_json())).job
    assert [each.generation for each in read.by_question()] == [
        GenerationOptions(**general),
        GenerationOptions(**{**general, **own}),
    ]
    with pytest.raises(InvalidJob, match="questions: min_tokens 9 is above max_new_tokens 8"):
        AnalysisJob(questions=[{"prompt": "?", "generation": {"max_new_tokens": 8}}], generation={"min_tokens": 9})


def test_as_many_as_may_be_asked_are() -> None:
    AnalysisJob(questions=["?"] * 4, generation=GenerationOptions(n=16))
    AnalysisJob(questions=[Question(prompt="?")] * MAX_ANSWERS)
    AnalysisJob(prompt="?", generation={"logprobs": True, "max_new_tokens": MAX_LOGPROBS})


def test_what_is_said_is_shared_with_each_question() -> None:
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "about this:"}]
    for text, alone in zip("ab", AnalysisJob(messages=turns, questions=["a", "b"]).by_question(), strict=True):
        said = [{"type": "text", "text": each} for each in ("about this:", text)]
        assert alone == AnalysisJob(messages=[turns[0], {"role": "user", "content": said}])


def test_a_bare_text_among_the_questions_of_a_message_is_no_question() -> None:
    sealed = {"schema_version": 2, "job_id": "1", "submitted_at": 0, "job": {"questions": ["?"]}}
    with pytest.raises(InvalidJob, match=r"job\.questions\.0: Input should be an object, not text"):
        open_sealed(sealed)
