"""Jobs that are delivered or tried more than once have one result."""

import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from PIL import Image

from keye.config import keys
from keye.config.codes import ErrorCode, JobState, Stage
from keye.config.faults import Fault, JobFailed
from keye.config.job import Priority
from keye.config.outcome import FailedAttempt, JobResult
from keye.config.topology import QUEUE, UNACKED, message_list, result_key
from keye.config.wire import seal
from keye.worker.tasks import retry_policy
from tests.integration.analyze.plant import (
    FaultyInbox,
    FaultyProcessor,
    Plant,
    a_dead_worker,
    a_job,
    briefly,
    finish_with_reaper,
    reaping,
)
from tests.support.conditions import eventually


@pytest.mark.holds(
    "docs/design.md#decisions",
    "A second delivery of a claimed or settled job is acknowledged without work.",
    "So a message that comes twice costs nothing but a round trip.",
)
def test_second_delivery_of_a_settled_job_does_no_work_and_finds_the_outcome(plant: Plant) -> None:
    sealed = seal(a_job(result_ttl_seconds=60))
    payload = sealed.model_dump(mode="json")
    first = plant.send(payload, sealed.job_id).get(timeout=20)
    ended_at = plant.record(sealed.job_id)["ended_at"]

    again = plant.send(payload, f"{sealed.job_id}-again").get(timeout=20)
    assert again == first
    assert plant.record(sealed.job_id)["ended_at"] == ended_at
    assert plant.record(sealed.job_id)["attempts"] == "1"
    assert 0 < plant.redis.ttl(result_key(f"{sealed.job_id}-again")) <= 60


@pytest.mark.holds("docs/design.md#decisions", "A second delivery of a claimed or settled job")
def test_second_delivery_of_a_running_job_leaves_its_result_alone(plant: Plant) -> None:
    with FaultyProcessor.held_up():
        job = plant.client.submit(a_job(prompt="wait"))
        eventually(lambda: job.state is JobState.RUNNING)
        sealed = json.loads(plant.record(job.id)["sealed"])
        second = plant.send(sealed, f"{job.id}-second")
        eventually(lambda: plant.redis.llen(QUEUE) == 0 and plant.redis.hlen(UNACKED) <= 1)
    assert plant.finish(job).attempts == 1
    assert second.state == "PENDING", "acknowledged without a result"


@pytest.mark.holds("docs/design.md#decisions", "leases on our own record are why that does no harm here")
def test_job_longer_than_every_timeout_runs_once(plant: Plant) -> None:
    with FaultyProcessor.held_up():
        job = plant.client.submit(a_job(prompt="wait"))
        eventually(lambda: job.state is JobState.RUNNING)
        # The broker gave its message to a worker again, which acknowledged it without work.
        eventually(lambda: plant.redis.hlen(UNACKED) == 0 and plant.redis.llen(QUEUE) == 0)
        assert job.state is JobState.RUNNING
    result = plant.finish(job)
    assert result.attempts == 1
    assert JobResult.model_validate(plant.celery_result(job.id).get(timeout=10)) == result


def test_job_of_a_dead_worker_is_answered_by_a_living_one(plant: Plant) -> None:
    sealed = seal(a_job())
    dead, reaper = a_dead_worker(plant, sealed)
    eventually(lambda: sealed.job_id in dead.due(keys.LEASES, 10))
    reaper.reap_overdue()
    assert plant.finish(plant.client.find(sealed.job_id)).attempts == 2


def test_job_that_killed_its_last_worker_ends_with_worker_lost(plant: Plant) -> None:
    sealed = seal(a_job(max_attempts=1, metadata={"order": 7}))
    dead, reaper = a_dead_worker(plant, sealed)
    eventually(lambda: sealed.job_id in dead.due(keys.LEASES, 10))
    reaper.reap_overdue()
    assert plant.client.find(sealed.job_id).state is JobState.FAILED

    failed = plant.fail(plant.client.find(sealed.job_id))
    assert failed.code is ErrorCode.WORKER_LOST
    assert "worker-that-died" in failed.failure.message
    assert failed.failure.metadata == {"order": 7}
    with pytest.raises(JobFailed):
        plant.celery_result(sealed.job_id).get(timeout=10)


def test_store_that_is_away_for_a_moment_costs_an_attempt_and_no_answer(plant: Plant) -> None:
    FaultyProcessor.misfortunes.append(
        Fault(ErrorCode.MEDIA_UNREACHABLE, "s3://b/k: answered 503 SlowDown.", retry_after_seconds=0.3)
    )
    job = plant.client.submit(a_job())
    eventually(lambda: job.state is JobState.QUEUED and "due_at" in plant.record(job.id))
    told = FailedAttempt.model_validate_json(plant.record(job.id)["attempt:1"])
    assert (told.attempt, told.worker, told.stage) == (1, "here:1", Stage.PREPARE)
    assert (told.code, told.message) == (ErrorCode.MEDIA_UNREACHABLE, "s3://b/k: answered 503 SlowDown.")
    assert 0 < told.began_at <= told.ended_at <= float(plant.record(job.id)["due_at"]) - 0.3

    result = finish_with_reaper(plant, job)
    assert result.attempts == 2
    assert JobResult.model_validate(plant.celery_result(job.id).get(timeout=10)) == result
    assert not result.warnings


@pytest.mark.holds(
    "docs/operations.md#which-failures-are-tried-again",
    "what the store asked for by `Retry-After` comes on top, an hour at most",
)
def test_store_that_asks_for_a_day_is_tried_again_in_an_hour(plant: Plant) -> None:
    FaultyProcessor.misfortunes.append(Fault(ErrorCode.MEDIA_UNREACHABLE, "answered 503", retry_after_seconds=86400))
    job = plant.client.submit(a_job())
    due_at = eventually(lambda: plant.record(job.id).get("due_at"))
    assert float(due_at) - time.time() == pytest.approx(3600, abs=30)
    job.cancel()


@pytest.fixture
def trying_media_for(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], None]]:
    """Has the worker try unreachable media for so many seconds, after short pauses."""
    monkeypatch.setattr(retry_policy, "FIRST_PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(retry_policy, "MAX_PAUSE_SECONDS", 0.1)
    analyst, bench = plant.app.analyst, plant.bench

    def set_window(seconds: float) -> None:
        analyst._bench = replace(bench, media_retry_seconds=seconds)

    yield set_window
    analyst._bench = bench
    FaultyProcessor.misfortunes.clear()


AWAY = Fault(ErrorCode.MEDIA_UNREACHABLE, "s3://b/k: answered 503.")


@pytest.mark.holds("docs/producers.md#from-python", "Left out, three times, and longer while a store is away.")
@pytest.mark.holds(
    "docs/operations.md#which-failures-are-tried-again", "while its media are unreachable it is tried further"
)
def test_outage_of_a_store_costs_no_job_that_sets_no_attempts(
    plant: Plant, trying_media_for: Callable[[float], None]
) -> None:
    trying_media_for(900)
    FaultyProcessor.misfortunes += [AWAY] * 6
    result = finish_with_reaper(plant, job := plant.client.submit(a_job()))
    assert (result.attempts, result.warnings) == (7, ())
    record = plant.record(job.id)
    assert (record["num_unreachable"], record["max_attempts"]) == ("6", "9")


@pytest.mark.holds("docs/producers.md#from-python", "`max_attempts` bounds how often it is tried.")
@pytest.mark.holds("docs/operations.md#which-failures-are-tried-again", "has so many attempts in all, whatever ended")
def test_job_that_sets_its_attempts_has_exactly_those(plant: Plant, trying_media_for: Callable[[float], None]) -> None:
    trying_media_for(900)
    FaultyProcessor.misfortunes += [AWAY] * 9
    once = plant.fail(plant.client.submit(a_job(max_attempts=1))).failure
    assert (once.attempts, once.message) == (1, "s3://b/k: answered 503.")
    with reaping(plant):
        thrice = plant.fail(plant.client.submit(a_job(max_attempts=3))).failure
    assert thrice.attempts == 3
    assert re.search(r"answered 503\. It was tried 3 times in \d+ s \(limit: its max_attempts\)\.", thrice.message)


def test_store_that_stays_away_ends_the_job_with_the_window_and_says_so(
    plant: Plant, trying_media_for: Callable[[float], None]
) -> None:
    trying_media_for(2)
    FaultyProcessor.misfortunes += [AWAY] * 1000
    with reaping(plant):
        failure = plant.fail(job := plant.client.submit(a_job(deadline_seconds=600))).failure
    assert failure.code is ErrorCode.MEDIA_UNREACHABLE
    assert 3 < failure.attempts < 100
    told = rf"It was tried {failure.attempts} times in \d s \(limit: KEYE_MEDIA_RETRY_SECONDS, 2 s or its deadline\)"
    assert re.search(told, failure.message)
    record = plant.record(job.id)
    began_at = float(json.loads(record[f"attempt:{failure.attempts}"])["began_at"])
    # The end is reckoned here, from a claim that the server has dated some of its microseconds before.
    assert began_at >= float(record["unreachable_since"]) + 2 - 0.05, "the last was at the window's end"


@pytest.mark.holds(
    "docs/operations.md#which-failures-are-tried-again",
    "with half of the visual tokens; the result then has a warning",
)
def test_job_too_large_for_the_memory_is_answered_from_half_of_the_pixels(plant: Plant) -> None:
    path = plant.media / "large.png"
    Image.new("RGB", (560, 560), "teal").save(path)
    whole = plant.finish(plant.client.submit(prompt="what?", media=[str(path)], generation=briefly()))
    FaultyInbox.misfortunes.append(Fault(ErrorCode.OUT_OF_MEMORY, "too large"))
    job = plant.client.submit(prompt="what?", media=[str(path)], generation=briefly())
    eventually(lambda: "due_at" in plant.record(job.id))

    result = finish_with_reaper(plant, job)
    assert 0 < result.usage.visual_tokens <= whole.usage.visual_tokens // 2
    (warning,) = result.warnings
    assert f"{result.usage.visual_tokens} visual tokens" in warning
    assert "memory" in warning


def test_last_attempt_that_fails_is_the_outcome(plant: Plant) -> None:
    FaultyProcessor.misfortunes.append(Fault(ErrorCode.MEDIA_UNREACHABLE, "s3://b/k: answered 503."))
    failed = plant.fail(plant.client.submit(a_job(max_attempts=1)))
    assert failed.code is ErrorCode.MEDIA_UNREACHABLE
    assert failed.failure.attempts == 1


@pytest.mark.holds(
    "docs/operations.md#a-worker-was-killed-or-its-machine-is-gone-what-must-i-do",
    "A job whose worker died twice, or once before its last attempt, runs alone",
)
def test_job_that_may_have_killed_its_workers_runs_with_nothing_beside_it(plant: Plant) -> None:
    sealed = seal(a_job(prompt="wait", max_attempts=4))
    for _ in range(2):
        dead, _ = a_dead_worker(plant, sealed)
        eventually(lambda: sealed.job_id in dead.due(keys.LEASES, 10))  # noqa: B023
        dead.reap(sealed.job_id, "reaper")
    with FaultyProcessor.held_up(), reaping(plant):
        suspect = plant.client.find(sealed.job_id)
        eventually(lambda: suspect.state is JobState.RUNNING)
        neighbour = plant.client.submit(a_job())
        eventually(lambda: plant.redis.llen(message_list(Priority.NORMAL)) == 0)
        assert neighbour.state is JobState.QUEUED
    assert plant.finish(suspect).attempts == 3
    assert plant.finish(neighbour).attempts == 1
