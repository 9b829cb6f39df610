"""What a submission stores and publishes, and when two submissions ask for the same thing."""

import json
from base64 import b64decode
from typing import Any

import pytest

from keye.config.job import AnalysisJob, VideoPart
from keye.config.topology import message
from keye.config.wire import fingerprint_of, open_sealed, seal

JOB = AnalysisJob(prompt="Who waves?", media=(VideoPart(uri="s3://clips/wave.mp4", fps=2),), metadata={"a": 1, "b": 2})


def changed(**fields: Any) -> AnalysisJob:
    return AnalysisJob.model_validate(JOB.model_dump() | fields)


@pytest.mark.holds(
    "docs/design.md#decisions",
    "Submitting writes a record with the whole sealed job in it and a message with the same payload",
)
def test_the_worker_reads_the_same_job_from_record_and_message() -> None:
    sealed = seal(JOB)
    from_record = open_sealed(json.loads(sealed.record["sealed"]))
    published = message(sealed.job_id, sealed.model_dump_json(), JOB.priority)
    _, arguments, _ = json.loads(b64decode(json.loads(published)["body"]))
    from_message = open_sealed(arguments["sealed"])
    assert from_record == from_message == sealed
    assert from_record.job == JOB


def test_a_new_record_is_queued_with_no_attempts_and_its_limits_beside_it() -> None:
    record = seal(changed(max_attempts=5, priority="low")).record
    assert (record["state"], record["attempts"], record["max_attempts"]) == ("QUEUED", "0", "5")
    assert (record["priority"], record["deadline_at"]) == ("low", "")


def test_the_deadline_counts_from_the_submission() -> None:
    record = seal(changed(deadline_seconds=90)).record
    assert float(record["deadline_at"]) - float(record["submitted_at"]) == pytest.approx(90)


def test_a_job_sent_twice_gets_two_ids_and_one_fingerprint() -> None:
    first, second = seal(JOB), seal(changed(metadata={"b": 2, "a": 1}))
    assert first.job_id != second.job_id
    assert fingerprint_of(first.job) == fingerprint_of(second.job)


@pytest.mark.parametrize(
    "difference",
    [
        {"prompt": "Who waves"},
        {"media": [{"type": "image", "uri": "s3://clips/wave.mp4"}]},
        {"thinking": "think"},
        {"generation": {"seed": 1}},
        {"metadata": {"a": 1}},
        {"priority": "high"},
    ],
)
def test_a_job_that_differs_anywhere_has_another_fingerprint(difference: dict[str, Any]) -> None:
    assert fingerprint_of(changed(**difference)) != fingerprint_of(JOB)
