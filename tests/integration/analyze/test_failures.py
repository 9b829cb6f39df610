"""What a job that cannot be answered tells its caller and the operator; whatever is raised, its slot is free again."""

import json
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image

from keye.config import keys, wire
from keye.config.codes import ErrorCode, JobState, Stage
from keye.config.faults import JobFailed
from keye.config.topology import UNACKED
from keye.config.wire import SCHEMA_VERSION, SealedJob, seal
from keye.producer import Cancellation
from keye.worker.engine.model_runner import ModelRunner
from keye.worker.model.processor import KeyeProcessor
from tests.integration.analyze.plant import (
    CONCURRENCY,
    FAULTS,
    FaultyEvents,
    FaultySettlement,
    Plant,
    a_job,
    a_reaper,
    briefly,
    endlessly,
    reaping,
)
from tests.support.conditions import eventually


def test_the_log_tells_why_a_job_failed(plant: Plant, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="keye.worker.results.settlement")
    failed = plant.fail(plant.client.submit(prompt="what?", media=[str(plant.media / "no\nthing.jpg")]))
    begins = f"job {failed.failure.job_id}: FAILED"
    eventually(lambda: any(line.startswith(begins) for line in caplog.messages))
    (ending,) = [line for line in caplog.messages if line.startswith(begins)]
    assert ending.endswith(f"in fetch: MEDIA_NOT_FOUND: {failed.failure.message!r}")
    assert "\n" not in ending


@pytest.mark.parametrize("culprit", [(KeyeProcessor, "prepare_text"), (ModelRunner, "encode"), (ModelRunner, "run")])
def test_a_warning_of_a_library_is_told_and_fails_no_job(
    plant: Plant, picture: str, culprit: tuple[type, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_order = getattr(*culprit)

    def warn_first(*args: Any, **kwargs: Any) -> Any:
        warnings.warn("the next release is not for you", FutureWarning, stacklevel=2)
        return in_order(*args, **kwargs)

    monkeypatch.setattr(*culprit, warn_first)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("error")
        plant.finish(plant.client.submit(prompt="what?", media=[picture], generation=briefly()))
    assert "the next release is not for you" in {str(warning.message) for warning in told}


def test_words_of_an_unexpected_error_in_the_engine_stay_in_the_log(
    plant: Plant, picture: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def break_down(*_: Any) -> None:
        raise RuntimeError("a secret of the operator")

    monkeypatch.setattr(ModelRunner, "run", break_down)
    failed = plant.fail(plant.client.submit(prompt="what?", media=[picture]))
    assert failed.code is ErrorCode.INTERNAL
    assert failed.failure.message == (
        "The model failed on this job with RuntimeError. The worker's log has the traceback."
    )
    assert "a secret of the operator" in caplog.text


@pytest.mark.holds("README.md#ask-a-question", "or as a failure with a stable code")
def test_missing_file_fails_with_its_code_and_which_medium(plant: Plant, picture: str) -> None:
    job = plant.client.submit(prompt="what?", media=[picture, str(plant.media / "nothing.jpg")])
    failed = plant.fail(job)

    assert failed.code is ErrorCode.MEDIA_NOT_FOUND
    assert failed.failure.media_index == 1
    assert failed.failure.stage is Stage.FETCH
    assert job.state is JobState.FAILED
    with pytest.raises(JobFailed) as of_celery:
        plant.celery_result(job.id).get(timeout=10)
    assert of_celery.value.failure == failed.failure


def test_corrupt_file_fails_while_decoding(plant: Plant) -> None:
    broken = plant.media / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff\xe0" + bytes(200))
    failed = plant.fail(plant.client.submit(prompt="what?", media=[str(broken)]))
    assert failed.code in (ErrorCode.MEDIA_CORRUPT, ErrorCode.MEDIA_UNSUPPORTED)
    assert failed.failure.stage is Stage.DECODE


def test_picture_too_narrow_for_the_model_is_the_mediums_fault(plant: Plant) -> None:
    path = plant.media / "line.png"
    Image.new("RGB", (28 * 300, 28)).save(path)
    failed = plant.fail(plant.client.submit(prompt="what?", media=[str(path)]))
    assert failed.code is ErrorCode.MEDIA_UNSUPPORTED
    assert "aspect ratio" in failed.failure.message
    assert failed.failure.media_index == 0


def test_prompt_longer_than_the_context_names_the_numbers(plant: Plant) -> None:
    failed = plant.fail(plant.client.submit(prompt="what?", generation={"max_new_tokens": 100_000}))
    assert failed.code is ErrorCode.PROMPT_TOO_LONG
    assert "100000" in failed.failure.message
    assert "40960" in failed.failure.message


def test_unknown_schema_version_is_its_own_code(plant: Plant) -> None:
    sent = plant.send({"schema_version": 99, "job_id": "from-the-future", "anything": True}, "task-1")
    with pytest.raises(JobFailed) as caught:
        sent.get(timeout=20)
    assert caught.value.code is ErrorCode.UNKNOWN_SCHEMA_VERSION
    assert caught.value.failure.job_id == "from-the-future"
    assert plant.record("from-the-future")["state"] == JobState.FAILED


@pytest.fixture
def newer(plant: Plant) -> Iterator[Callable[[float], dict[str, Any]]]:
    """Has the worker leave newer jobs to others for so many seconds, and seals one of a version it does not know."""
    analyst, bench = plant.app.analyst, plant.bench

    def seal_newer(patience_seconds: float) -> dict[str, Any]:
        analyst._bench = replace(bench, newer_job_seconds=patience_seconds)
        payload = json.loads(seal(a_job(priority="low", deadline_seconds=300)).model_dump_json())
        return payload | {"schema_version": SCHEMA_VERSION + 1}

    yield seal_newer
    analyst._bench = bench


@pytest.mark.parametrize("has_record", [True, False])
def test_a_newer_job_goes_back_to_the_queue_until_a_worker_comes_that_knows_it(
    plant: Plant, newer: Callable[..., Any], has_record: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    payload = newer(60)
    job_id = payload["job_id"]
    if has_record:
        record = SealedJob.model_validate(payload).record | {"sealed": json.dumps(payload)}
        plant.redis.hset(keys.record(job_id), mapping=record)
    plant.send(payload, job_id)
    with reaping(plant):
        # Taken, left and published once more: not ended, and no attempt.
        eventually(lambda: plant.record(job_id).get("is_republished"))
        record = plant.record(job_id)
        assert record["state"] == JobState.QUEUED
        assert record["attempts"] == "0"
        assert (record["priority"], record["max_attempts"]) == ("low", "3")
        assert json.loads(record["sealed"]) == payload
        # The fleet is upgraded.
        monkeypatch.setattr(wire, "SCHEMA_VERSION", SCHEMA_VERSION + 1)
        result = plant.finish(plant.client.find(job_id))
    assert result.attempts == 1
    assert plant.redis.zscore(keys.LEASES, job_id) is None


@pytest.mark.holds("docs/alerts.md#keyeoldestjobold", "one of a newer release waits for workers that know it")
@pytest.mark.holds("docs/operations.md#how-do-i-upgrade-a-fleet", "Only then it fails with `UNKNOWN_SCHEMA_VERSION`")
def test_a_newer_job_that_no_worker_knows_ends_when_its_time_is_over(plant: Plant, newer: Callable[..., Any]) -> None:
    payload = newer(2.5)
    began_at = time.monotonic()
    sent = plant.send(payload, payload["job_id"])
    with reaping(plant), pytest.raises(JobFailed) as caught:
        sent.get(timeout=30)
    assert time.monotonic() - began_at >= 2.5
    assert caught.value.code is ErrorCode.UNKNOWN_SCHEMA_VERSION
    assert f"version {SCHEMA_VERSION + 1}" in caught.value.failure.message
    assert plant.record(payload["job_id"])["attempts"] == "1"


def test_a_newer_job_can_be_cancelled_by_an_older_producer(plant: Plant, newer: Callable[..., Any]) -> None:
    payload = newer(60)
    payload["job"]["planted"] = "by a newer release"
    payload["job"]["metadata"] = {"order": 7}
    plant.send(payload, payload["job_id"])
    eventually(lambda: plant.record(payload["job_id"]))
    job = plant.client.find(payload["job_id"])
    assert job.cancel() is Cancellation.CANCELLED
    assert plant.fail(job).failure.metadata == {"order": 7}


@pytest.mark.parametrize("says", ["nothing", "a job of today"])
def test_a_message_that_hides_that_its_job_is_newer_has_no_older_worker_end_it(
    plant: Plant, newer: Callable[..., Any], says: str
) -> None:
    payload = newer(60)
    job_id = payload["job_id"]
    record = SealedJob.model_validate(payload).record | {"sealed": json.dumps(payload)}
    plant.redis.hset(keys.record(job_id), mapping=record)
    plant.send(None if says == "nothing" else payload | {"schema_version": 1}, job_id)
    eventually(lambda: plant.record(job_id).get("left_seconds"))
    assert plant.record(job_id)["state"] == JobState.QUEUED
    plant.client.find(job_id).cancel()


@pytest.mark.parametrize("payload", [None, [], {"schema_version": 1}, {"schema_version": 1, "job_id": 5}])
def test_message_without_a_usable_job_fails_under_its_celery_id(plant: Plant, payload: Any) -> None:
    task_id = f"unreadable-{uuid.uuid4()}"
    with pytest.raises(JobFailed) as caught:
        plant.send(payload, task_id).get(timeout=20)
    assert caught.value.code is ErrorCode.INVALID_JOB
    assert caught.value.failure.stage is Stage.OPEN
    assert plant.record(task_id)["state"] == JobState.FAILED


@pytest.mark.holds(
    "docs/design.md#one-job-walked",
    "Every exception on the way becomes a failure with a code, or another attempt",
)
@pytest.mark.parametrize("kind", FAULTS)
def test_whatever_is_raised_under_a_job_is_its_outcome_and_frees_its_slot(
    plant: Plant, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    jobs = [plant.client.submit(a_job(prompt=f"break with {kind}")) for _ in range(CONCURRENCY + 1)]
    for job in jobs:
        failed = plant.fail(job)
        assert failed.code is ErrorCode.INTERNAL
        assert failed.failure.stage is Stage.PREPARE
        assert failed.failure.retryable
        assert kind in failed.failure.message
        assert "secret" not in failed.failure.message
    assert plant.finish(plant.client.submit(a_job())).attempts == 1
    tracebacks = [entry for entry in caplog.records if entry.exc_info and jobs[0].id in entry.getMessage()]
    assert len(tracebacks) == 1, "the operator finds the traceback once"
    eventually(lambda: plant.redis.hlen(UNACKED) == 0)


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, MemoryError, GeneratorExit])
@pytest.mark.parametrize(
    ("place", "stage"),
    [
        ('"fetch"', Stage.FETCH),
        ('"decode"', Stage.DECODE),
        ('"frames"', Stage.DECODE),
        ('"generate"', Stage.GENERATE),
        ('"text"', Stage.GENERATE),
    ],
)
def test_wherever_it_is_raised_it_ends_its_job_and_nothing_goes_on_for_it(
    plant: Plant, clip: str, kind: type[BaseException], place: str, stage: Stage
) -> None:
    FaultyEvents.misfortunes[place] = kind("on purpose")
    failed = plant.fail(plant.client.submit(prompt="go on", media=[clip], generation=endlessly(), max_attempts=1))
    assert (failed.code, failed.failure.stage) == (ErrorCode.INTERNAL, stage)
    assert kind.__name__ in failed.failure.message
    assert plant.finish(plant.client.submit(prompt="what?", media=[clip], generation=briefly())).attempts == 1
    eventually(lambda: plant.engine.snapshot().running == 0)


@pytest.mark.parametrize("kind", [SystemExit, MemoryError])
def test_outcome_that_cannot_be_written_becomes_a_failure(plant: Plant, kind: type[BaseException]) -> None:
    FaultySettlement.misfortunes.append(kind("on purpose"))
    failed = plant.fail(plant.client.submit(a_job(metadata={"order": 7})))
    assert failed.code is ErrorCode.INTERNAL
    assert failed.failure.metadata == {"order": 7}


@pytest.mark.parametrize("field", ["prompt", "job_id", "idempotency_key"])
def test_message_with_half_a_character_fails_by_name(plant: Plant, field: str) -> None:
    payload = seal(a_job()).model_dump(mode="json")
    (payload if field == "job_id" else payload["job"])[field] = "\ud83d"
    job_id = f"half-a-{field}" if field == "job_id" else payload["job_id"]
    plant.send(payload, job_id)
    eventually(lambda: "outcome" in plant.record(job_id))
    assert plant.fail(plant.client.find(job_id)).code is ErrorCode.INVALID_JOB


def test_record_without_a_readable_job_ends_as_a_failure(plant: Plant) -> None:
    plant.redis.hset(keys.record("scribbled"), mapping={"state": "QUEUED", "sealed": "{'not': JSON}"})
    plant.redis.zadd(keys.LEASES, {"scribbled": time.time() - 1})
    a_reaper(plant).reap_overdue()
    assert plant.fail(plant.client.find("scribbled")).code is ErrorCode.INVALID_JOB
