"""Jobs of many questions on a worker: what they share, how each ends for itself, and what ends all of them."""

from collections import Counter
from typing import Any

import pytest

from keye.config.codes import ErrorCode, JobState
from keye.config.event import AnswerEnded, FramesDecoded, StageStarted, TextGenerated
from keye.config.faults import Fault
from keye.config.job import Question
from keye.config.outcome import Answer, JobResult, Unanswered
from keye.config.wire import seal
from keye.producer import Cancellation, Job
from keye.worker.engine.model_runner import ModelRunner
from tests.integration.analyze.plant import (
    FaultyInbox,
    FaultyProcessor,
    Plant,
    a_dead_worker,
    a_job,
    briefly,
    endlessly,
    generating,
    reaping,
)
from tests.support.conditions import eventually

ASKED = ["What do you see?", "Why?", "Where is it, and since when?", "?"]
# Longer than the context of this checkpoint.
TOO_LONG = "word " * 100_000


def answers_of(result: JobResult) -> list[str]:
    assert all(isinstance(each, Answer) for each in result.answers)
    return [each.raw_text for each in result.answers if isinstance(each, Answer)]


def several(**options: Any) -> dict[str, Any]:
    return {"questions": ASKED, "generation": briefly(max_new_tokens=12), **options}


@pytest.mark.holds(
    "docs/answers.md#many-questions-about-one-clip",
    "The clip is fetched, decoded and encoded once",
    "Greedy answers are those that a job for each would get.",
)
@pytest.mark.parametrize("medium", ["picture", "clip"])
def test_answers_are_those_of_separate_jobs_and_the_media_are_fetched_and_decoded_once(
    plant: Plant, medium: str, request: pytest.FixtureRequest
) -> None:
    media = [request.getfixturevalue(medium)]
    job = plant.client.submit(media=media, **several())
    result = plant.finish(job)
    alone = [
        plant.finish(plant.client.submit(media=media, prompt=text, generation=briefly(max_new_tokens=12)))
        for text in ASKED
    ]
    assert answers_of(result) == [each.raw_text for each in alone]
    assert [(each.question, each.sample) for each in result.answers] == [(n, 0) for n in range(len(ASKED))]
    assert result.answer == alone[0].answer
    for name in ("prompt_tokens", "visual_tokens", "completion_tokens"):
        assert getattr(result.usage, name) == sum(getattr(each.usage, name) for each in alone)
    events = list(job.events())
    assert Counter(event.stage for event in events if isinstance(event, StageStarted)).most_common(1)[0][1] == 1
    decoded = [event for event in events if isinstance(event, FramesDecoded)]
    assert len({event.total for event in decoded}) == (1 if medium == "clip" else 0)
    assert decoded[-1:] == [event for event in decoded if event.done == event.total]


@pytest.mark.holds(
    "docs/answers.md#many-questions-about-one-clip", "`question` and `sample` of a `text` event say whose text it is"
)
def test_every_answer_has_a_stream_of_its_own(plant: Plant, picture: str) -> None:
    generation = briefly(temperature=1.2, n=2, max_new_tokens=40)
    job = plant.client.submit(media=[picture], **several(generation=generation))
    texts: dict[tuple[int, int, str], str] = {}
    ended: list[tuple[int, int, ErrorCode | None]] = []
    of_all = []
    for event in job.events():
        if isinstance(event, TextGenerated | AnswerEnded):
            of_all.append(event.num_tokens_of_all or 0)
        if isinstance(event, TextGenerated):
            place = event.question, event.sample, event.channel
            assert event.offset == len(texts.get(place, ""))
            assert event.num_tokens <= 40
            texts[place] = texts.get(place, "") + event.text
        elif isinstance(event, AnswerEnded):
            ended.append((event.question, event.sample, event.code))
    assert sorted(ended) == [(question, sample, None) for question in range(len(ASKED)) for sample in range(2)]
    result = plant.finish(job)
    # Whoever reads the newest event alone, as `keye list` does, knows how much is written.
    assert of_all == sorted(of_all)
    assert of_all[-1] == result.usage.completion_tokens
    for answer in result.answers:
        assert isinstance(answer, Answer)
        for channel in ("analysis", "reasoning", "answer"):
            assert texts.get((answer.question, answer.sample, channel), "") == (getattr(answer, channel) or "")


@pytest.mark.holds(
    "docs/answers.md#many-questions-about-one-clip",
    "Each may have a `thinking`, options of `generation` and a `response_schema` of its own",
)
def test_what_a_question_says_itself_holds_for_it_alone(plant: Plant, picture: str) -> None:
    own = Question(prompt="b", thinking="think", generation=briefly(max_new_tokens=3, stop=["\ufdd1"]))
    result = plant.finish(plant.client.submit(media=[picture], questions=["a", own], generation=briefly(seed=5)))
    first, second = result.answers
    assert isinstance(first, Answer)
    assert isinstance(second, Answer)
    assert (first.generation.max_new_tokens, first.generation.seed, first.generation.thinking) == (6, 5, "auto")
    assert (second.generation.max_new_tokens, second.generation.stop, second.generation.thinking) == (
        3,
        ("\ufdd1",),
        "think",
    )


@pytest.mark.holds("docs/answers.md#many-questions-about-one-clip", "`questions` also go with `messages`")
def test_questions_about_a_conversation_end_its_last_turn(plant: Plant, picture: str) -> None:
    turns: list[dict[str, Any]] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Look: "}]
    result = plant.finish(plant.client.submit(messages=turns, **several()))
    alone = [
        plant.finish(
            plant.client.submit(
                messages=[turns[0], {"role": "user", "content": f"Look: {text}"}],
                generation=briefly(max_new_tokens=12),
            )
        )
        for text in ASKED
    ]
    assert answers_of(result) == [each.raw_text for each in alone]
    assert result.usage.prompt_tokens == sum(each.usage.prompt_tokens for each in alone)


@pytest.mark.holds(
    "docs/answers.md#many-questions-about-one-clip",
    'A question that cannot be answered is an entry with `kind` "unanswered"',
)
def test_a_question_that_is_too_long_leaves_the_others_and_what_they_see(plant: Plant, picture: str) -> None:
    fields = several(questions=[TOO_LONG, *ASKED])
    job = plant.client.submit(media=[picture], **fields)
    result = plant.finish(job)
    failed, *others = result.answers
    assert isinstance(failed, Unanswered)
    assert failed.code is ErrorCode.PROMPT_TOO_LONG
    assert "Shorten the text" in failed.message
    whole = plant.finish(plant.client.submit(media=[picture], **several()))
    assert [each.raw_text for each in others if isinstance(each, Answer)] == answers_of(whole)
    assert result.media == whole.media
    assert (result.answer, result.usage) == (whole.answer, whole.usage)
    told = [event.code for event in job.events() if isinstance(event, AnswerEnded) and event.question == 0]
    assert told == [ErrorCode.PROMPT_TOO_LONG]


def test_a_question_that_the_engine_fails_on_leaves_the_others(
    plant: Plant, picture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ModelRunner.run

    def break_down(runner: ModelRunner, chunks: Any) -> Any:
        if any(chunk.sequence.num_prompt_tokens > 800 for chunk in chunks):
            raise RuntimeError("a secret of the operator")
        return run(runner, chunks)

    monkeypatch.setattr(ModelRunner, "run", break_down)
    job = plant.client.submit(media=[picture], **several(questions=[*ASKED, "word " * 1000]))
    *others, failed = plant.finish(job).answers
    assert [type(each) for each in others] == [Answer] * len(ASKED)
    assert isinstance(failed, Unanswered)
    assert failed.code is ErrorCode.INTERNAL
    told = {event.question: event.code for event in job.events() if isinstance(event, AnswerEnded)}
    assert told == {**dict.fromkeys(range(4)), 4: ErrorCode.INTERNAL}


def test_the_job_fails_where_no_question_can_be_answered(plant: Plant, picture: str) -> None:
    failed = plant.fail(plant.client.submit(media=[picture], questions=[TOO_LONG, TOO_LONG + "b"]))
    assert failed.code is ErrorCode.PROMPT_TOO_LONG
    failed = plant.fail(plant.client.submit(questions=["break with ValueError"] * 2))
    assert failed.code is ErrorCode.INTERNAL
    assert "secret" not in failed.failure.message


def test_the_job_is_tried_again_where_each_question_met_what_may_pass(plant: Plant) -> None:
    away = [Fault(ErrorCode.MEDIA_UNREACHABLE, "s3://b/k: answered 503.", retry_after_seconds=0) for _ in ASKED]
    FaultyProcessor.misfortunes.extend(away)
    with reaping(plant):
        result = plant.finish(plant.client.submit(**several()))
    assert (result.attempts, len(answers_of(result))) == (2, len(ASKED))


def test_a_question_that_breaks_something_leaves_the_others_and_is_in_the_log(
    plant: Plant, caplog: pytest.LogCaptureFixture
) -> None:
    result = plant.finish(plant.client.submit(**several(questions=["break with ValueError", *ASKED])))
    failed, *others = result.answers
    assert isinstance(failed, Unanswered)
    assert failed.code is ErrorCode.INTERNAL
    assert "secret" not in failed.message
    assert all(isinstance(each, Answer) for each in others)
    assert "a secret in break with ValueError" in caplog.text


def running(plant: Plant, **options: Any) -> Job:
    job = plant.client.submit(questions=ASKED, generation=endlessly(), **options)
    eventually(lambda: generating(plant, job.id))
    eventually(lambda: plant.engine.snapshot().running >= len(ASKED))
    return job


def test_a_cancelled_job_ends_all_its_generations(plant: Plant) -> None:
    job = running(plant)
    assert job.cancel() is Cancellation.REQUESTED
    failed = plant.fail(job)
    assert (failed.code, job.state) == (ErrorCode.CANCELLED, JobState.CANCELLED)
    assert failed.failure.partial is not None
    assert failed.failure.partial.raw_text
    eventually(lambda: plant.engine.snapshot().running == 0)


def test_a_deadline_ends_all_its_generations(plant: Plant) -> None:
    failed = plant.fail(running(plant, deadline_seconds=1.5))
    assert failed.code is ErrorCode.DEADLINE_EXCEEDED
    eventually(lambda: plant.engine.snapshot().running == 0)


def test_a_job_whose_worker_died_is_asked_all_over(plant: Plant) -> None:
    sealed = seal(a_job(prompt=None, questions=ASKED))
    a_dead_worker(plant, sealed)
    with reaping(plant):
        result = plant.finish(plant.client.find(sealed.job_id))
    assert result.attempts == 2
    assert len(answers_of(result)) == len(ASKED)


def test_a_fault_of_the_host_is_the_whole_jobs(plant: Plant) -> None:
    FaultyInbox.misfortunes.append(OSError(28, "No space left on device"))
    with reaping(plant):
        result = plant.finish(plant.client.submit(**several()))
    assert len(answers_of(result)) == len(ASKED)


@pytest.mark.holds(
    "docs/answers.md#samples-probabilities-a-least-length",
    "the `seed` of each is told, and a job of its own with that seed gets the same answer",
)
def test_samples_are_those_of_jobs_with_the_seeds_that_are_told(plant: Plant, picture: str) -> None:
    options = briefly(temperature=1.0, max_new_tokens=12)
    job = plant.client.submit(media=[picture], prompt="what?", generation={**options, "n": 4, "seed": 2**53 - 2})
    result = plant.finish(job)
    seeds = [each.generation.seed for each in result.answers if isinstance(each, Answer)]
    assert len(set(seeds)) == 4
    assert len(set(answers_of(result))) > 1
    for seed, text in zip(seeds, answers_of(result), strict=True):
        again = plant.client.submit(media=[picture], prompt="what?", generation={**options, "seed": seed})
        assert plant.finish(again).raw_text == text
    drawn = plant.finish(plant.client.submit(prompt="what?", generation={**options, "n": 16}))
    assert len({each.generation.seed for each in drawn.answers if isinstance(each, Answer)}) == 16


def test_samples_of_a_checkpoint_that_is_greedy_are_warned_of(plant: Plant) -> None:
    result = plant.finish(plant.client.submit(prompt="what?", generation={"n": 2, "max_new_tokens": 4}))
    greedy = result.generation is not None and not result.generation.temperature
    assert greedy == any("(n) are the same" in warning for warning in result.warnings)
    assert (len(set(answers_of(result))) == 1) >= greedy


def test_logprobs_are_told_of_every_token(plant: Plant) -> None:
    result = plant.finish(plant.client.submit(prompt="what?", generation=briefly(logprobs=True, max_new_tokens=40)))
    assert result.logprobs is not None
    assert len(result.logprobs) == result.usage.completion_tokens
    assert all(each.logprob <= 0 for each in result.logprobs)
    tokenizer = plant.bench.processor.tokenizer
    assert tokenizer.decode([each.token_id for each in result.logprobs], skip_special_tokens=True) == result.raw_text
    assert plant.finish(plant.client.submit(a_job())).logprobs is None


def test_an_answer_has_its_least_tokens(plant: Plant) -> None:
    free = plant.finish(plant.client.submit(prompt="what?", generation=briefly(max_new_tokens=40, logprobs=True)))
    stop = free.raw_text[1:3]
    options = {"max_new_tokens": 40, "stop": [stop]}
    stopped = plant.finish(plant.client.submit(prompt="what?", generation=briefly(**options)))
    held = plant.finish(plant.client.submit(prompt="what?", generation=briefly(**options, min_tokens=20)))
    assert stopped.usage.completion_tokens < 20 <= held.usage.completion_tokens
    assert held.raw_text.startswith(free.raw_text[:4])
