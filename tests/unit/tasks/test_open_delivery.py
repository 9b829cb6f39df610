"""Messages as they come off the queue: good, foreign, broken."""

import json

import pytest

from keye.config.codes import ErrorCode
from keye.config.faults import Fault
from keye.config.job import AnalysisJob, Priority
from keye.config.wire import SealedJob, seal
from keye.worker.tasks.analyze import open_delivery


def test_good_message_gives_the_job_and_what_its_record_needs() -> None:
    sealed = seal(AnalysisJob(prompt="what?", deadline_seconds=60, priority=Priority.LOW, idempotency_key="k"))
    queued, opened = open_delivery(sealed.model_dump(mode="json"), "celery-id")
    assert opened == sealed
    assert queued.job_id == sealed.job_id
    assert queued.idempotency_key == "k"
    assert float(queued.record["deadline_at"]) == sealed.submitted_at + 60
    assert (queued.record["priority"], queued.record["max_attempts"]) == ("low", "3")
    assert SealedJob.model_validate_json(queued.record["sealed"]) == sealed


@pytest.mark.parametrize(
    ("payload", "code", "words"),
    [
        ({"schema_version": 99}, ErrorCode.UNKNOWN_SCHEMA_VERSION, "99"),
        ({"schema_version": 1}, ErrorCode.INVALID_JOB, "job_id"),
        ("not even an object", ErrorCode.INVALID_JOB, "job"),
        (None, ErrorCode.INVALID_JOB, "job"),
    ],
)
def test_unreadable_message_is_a_fault_under_the_deliverys_id(payload: object, code: ErrorCode, words: str) -> None:
    queued, opened = open_delivery(payload, "celery-id")
    assert isinstance(opened, Fault)
    assert opened.code is code
    assert words in opened.message
    assert queued.job_id == "celery-id"
    assert json.loads(queued.record["sealed"]) == payload


def test_unreadable_message_that_names_its_job_fails_that_job() -> None:
    queued, opened = open_delivery({"schema_version": 1, "job_id": "job-7", "job": {"prompt": ""}}, "celery-id")
    assert queued.job_id == "job-7"
    assert isinstance(opened, Fault)
    assert "prompt" in opened.message


@pytest.mark.parametrize("job", [{"idempotency_key": "order-9", "novelty": True}, {"idempotency_key": 9}, "text", None])
def test_unreadable_job_ends_with_its_idempotency_key_or_later_ones_would_find_it(job: object) -> None:
    queued, _ = open_delivery({"schema_version": 2, "job_id": "job-7", "job": job}, "celery-id")
    has_key = isinstance(job, dict) and job["idempotency_key"] == "order-9"
    assert queued.idempotency_key == ("order-9" if has_key else None)
