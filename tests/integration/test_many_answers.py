"""Many answers about one look, in the process that asks, with the small Keye."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from keye import Analyzer, Answer, JobResult, Unanswered
from keye.worker.demo.local_worker import SMALL_KEYE
from keye.worker.demo.scenes import draw_image_scene
from keye.worker.model.processor import KeyeProcessor
from tests.support.zoo import encode_clip, steady_times

ASKED = ["What do you see?", "What shape is it?", "What colour is it?", "How many shapes are there?"] * 2


@pytest.fixture(scope="module")
def analyzer() -> Iterator[Analyzer]:
    with Analyzer(SMALL_KEYE, device="cpu") as analyzer:
        yield analyzer


@pytest.fixture
def picture() -> Image.Image:
    return draw_image_scene(np.random.default_rng(3), num_shapes=1).image


def texts_of(result: JobResult) -> list[str]:
    return [each.answer for each in result.answers if isinstance(each, Answer)]


def test_eight_questions_are_answered_as_by_eight_jobs_with_the_picture_prepared_once(
    analyzer: Analyzer, picture: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = [analyzer.analyze(picture, question).answer for question in ASKED]
    assert {"A red circle.", "Red.", "One."} <= set(alone)
    prepared, prepare = [], KeyeProcessor.prepare_media
    monkeypatch.setattr(KeyeProcessor, "prepare_media", lambda *given: prepared.append(given) or prepare(*given))
    result = analyzer.submit(media=[picture], questions=ASKED).result()
    assert texts_of(result) == alone
    assert len(prepared) == len(result.media) == 1


def test_questions_with_options_of_their_own_are_written_as_loosely_as_a_job(
    analyzer: Analyzer, picture: Image.Image
) -> None:
    questions: list[Any] = ["What do you see?", {"prompt": "What colour is it?", "thinking": "no_think"}]
    result = analyzer.submit(media=picture, questions=questions, generation={"max_new_tokens": 64}).result()
    assert texts_of(result) == ["A red circle.", "Red."]
    assert result.answers[1].generation.thinking == "no_think"  # type: ignore[union-attr]


def test_samples_and_logprobs_are_options_of_an_answer(analyzer: Analyzer, picture: Image.Image) -> None:
    result = analyzer.analyze(picture, ASKED[0], n=3, do_sample=True, logprobs=True, min_tokens=2)
    assert len(texts_of(result)) == 3
    for each in result.answers:
        assert isinstance(each, Answer)
        assert each.logprobs is not None
        text = "".join(token.token for token in each.logprobs)
        assert text.startswith(each.raw_text)
    greedy = analyzer.analyze(picture, ASKED[0], n=3)
    assert texts_of(greedy) == ["A red circle."] * 3
    assert any("All samples (n) are the same" in warning for warning in greedy.warnings)


def test_each_answer_tells_what_it_read_and_the_job_the_sum(analyzer: Analyzer, tmp_path: Any) -> None:
    clip = encode_clip(tmp_path / "clip.mp4", steady_times(8))
    result = analyzer.submit(media=[clip], questions=ASKED, generation={"max_new_tokens": 8}).result()
    assert len(texts_of(result)) == len(ASKED)
    visual = {each.usage.visual_tokens for each in result.answers if isinstance(each, Answer)}
    assert len(visual) == 1
    assert result.usage.visual_tokens == len(ASKED) * visual.pop()


def test_each_answer_fits_its_own_schema(analyzer: Analyzer, picture: Image.Image) -> None:
    shape = {"type": "object", "properties": {"shape": {"enum": ["circle", "square"]}}, "required": ["shape"]}
    questions: list[Any] = [
        {"prompt": "What shape is it?", "response_schema": shape},
        {"prompt": "What colour is it?", "response_schema": ["Red.", "Blue."]},
        "What do you see?",
        {"prompt": "What shape is it?", "response_schema": shape, "generation": {"n": 3, "temperature": 1.5}},
        {"prompt": "?", "response_schema": {"type": "string", "minLength": 50}, "generation": {"max_new_tokens": 8}},
    ]
    result = analyzer.submit(media=[picture], questions=questions, thinking="no_think").result()
    *answers, unanswered = result.answers
    parsed = [each.parsed for each in answers if isinstance(each, Answer)]
    assert parsed[0]["shape"] in ("circle", "square")
    assert parsed[1:3] == ["Red.", None]
    assert all(each["shape"] in ("circle", "square") for each in parsed[3:])
    assert len(parsed) == 6
    assert isinstance(unanswered, Unanswered)
    assert "Raise max_new_tokens" in unanswered.message
    assert result.parsed == parsed[0]
