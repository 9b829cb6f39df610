"""docs/answers.md: its programs run as they are printed."""

import json

import pytest

from keye.config.job import MAX_ANSWERS, AnalysisJob
from keye.testing import MemoryClient
from keye.worker.model.cuda_attention import FlexForm, VarlenForm
from keye.worker.model.paged_attention import GatheredForm
from tests.support.pages import printed

RECEIPT = {"shop": "Lidl", "total": 12.5, "currency": "EUR"}


@pytest.mark.holds(
    "docs/answers.md#many-questions-about-one-clip", "job = client.submit( media=", "A job has at most 64"
)
def test_questions_about_a_clip(capsys: pytest.CaptureFixture[str]) -> None:
    (program,) = printed("docs/answers.md", "Many questions about one clip", language="python")
    said = {"How many people are there?": "Two.", "Describe the room.": "A lobby.", "Is anybody running?": "no"}
    client = MemoryClient(lambda job: [said[question.prompt] for question in job.questions])
    exec(program, {"client": client})
    assert capsys.readouterr().out == "0 Two.\n1 A lobby.\n2 no\n"
    assert MAX_ANSWERS == 64


@pytest.mark.holds("docs/answers.md#answers-that-fit", "from pydantic import BaseModel")
def test_a_receipt_is_read_into_a_model() -> None:
    (program,) = printed("docs/answers.md", "Answers that fit", language="python")
    asked: list[AnalysisJob] = []

    def reply(job: AnalysisJob) -> str:
        asked.append(job)
        return json.dumps(RECEIPT)

    names = {"client": MemoryClient(reply), "__name__": "page"}
    exec(program, names)
    assert names["receipt"].model_dump() == RECEIPT  # type: ignore[attr-defined]
    assert asked[0].response_schema == names["Receipt"].model_json_schema()  # type: ignore[attr-defined]


@pytest.mark.holds(
    "docs/answers.md#what-is-shared-between-jobs", "What is shared are full blocks of tokens: 16 on a CPU"
)
def test_blocks_are_of_the_sizes_that_are_told() -> None:
    assert [form.block_size for form in (GatheredForm, FlexForm, VarlenForm)] == [16, 128, 256]
