"""What stands for a line that has no answer."""

import json

import pytest

from keye import IdempotencyConflict, InvalidJob, JobUnreadable, UploadFailed
from keye.producer.batch.answers import Missing, error_line
from keye.producer.batch.lines import Row, State


@pytest.mark.holds(
    "docs/batches.md#what-does-it-write",
    "A code is that of a failed job, or one of these",
    "code | the line",
)
@pytest.mark.parametrize(
    ("end", "code"),
    [
        (InvalidJob("1 fault: prompt: is missing"), "INVALID_JOB"),
        (UploadFailed("s3://b/k: the store is away"), "UPLOAD_FAILED"),
        (IdempotencyConflict("It belongs to another."), "IDEMPOTENCY_CONFLICT"),
        (JobUnreadable("A newer release wrote it."), "OUTCOME_UNREADABLE"),
        (Missing(7.0, 60.0), "JOB_LOST"),
        (Missing(61.0, 60.0), "OUTCOME_EXPIRED"),
    ],
)
@pytest.mark.parametrize("is_openai", [False, True])
def test_each_way_to_end_without_an_answer_has_a_code(end: Exception | Missing, code: str, is_openai: bool) -> None:
    line = json.loads(error_line(Row(7, 0, "a", is_openai, State.SENT, 0.0), "job", end))  # type: ignore[arg-type]
    told = line["error"] if is_openai else line
    assert (line["custom_id"], told["code"]) == ("a", code)
    assert told["message"].startswith("line 7: ")
