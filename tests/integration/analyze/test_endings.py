"""Jobs that are stopped: by a deadline, a limit of the worker, their caller or the loss of their lease."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from celery.worker import state

from keye.config import keys
from keye.config.codes import ErrorCode, JobState, Stage
from keye.config.event import EVENT
from keye.config.faults import Fault, JobFailed
from keye.config.topology import UNACKED, UNACKED_INDEX
from keye.config.wire import seal
from keye.producer import Cancellation
from keye.worker.tasks import stragglers
from keye.worker.tasks.analyze import Analyst
from keye.worker.tasks.work_clock import WorkClock
from tests.integration.analyze.plant import FaultyProcessor, Plant, a_job, a_reaper, endlessly, generating
from tests.support.conditions import eventually
from tests.support.leased_jobs import ends


def test_who_sees_a_job_ended_finds_its_message_acknowledged(plant: Plant) -> None:
    for _ in range(20):
        plant.finish(plant.client.submit(a_job()))
        # Not a moment later: a worker that died in between would be given the message again.
        assert not plant.redis.exists(UNACKED, UNACKED_INDEX)


def test_job_past_its_deadline_expires_without_running(plant: Plant) -> None:
    sealed = seal(a_job(deadline_seconds=5))
    late = sealed.model_copy(update={"submitted_at": sealed.submitted_at - 60})
    with pytest.raises(JobFailed) as caught:
        plant.send(late.model_dump(mode="json"), late.job_id).get(timeout=20)
    assert caught.value.code is ErrorCode.DEADLINE_EXCEEDED
    assert plant.client.find(late.job_id).state is JobState.EXPIRED
    stages = [EVENT.validate_json(f["event"]) for _, f in plant.redis.xrange(keys.events(late.job_id))]
    assert [event.type for event in stages] == ["stage", "ended"]


def test_deadline_between_two_attempts_ends_the_job_and_its_celery_result(plant: Plant) -> None:
    FaultyProcessor.misfortunes.append(
        Fault(ErrorCode.MEDIA_UNREACHABLE, "s3://b/k: answered 503.", retry_after_seconds=60)
    )
    job = plant.client.submit(a_job(deadline_seconds=600, metadata={"order": 7}))
    eventually(lambda: "due_at" in plant.record(job.id))
    plant.redis.hset(keys.record(job.id), "deadline_at", time.time() - 1)
    plant.redis.zadd(keys.DEADLINES, {job.id: time.time() - 1})
    a_reaper(plant).look_around()

    failed = plant.fail(job)
    assert failed.code is ErrorCode.DEADLINE_EXCEEDED
    assert (failed.failure.stage, failed.failure.attempts, failed.failure.metadata) == (Stage.QUEUED, 1, {"order": 7})
    assert job.state is JobState.EXPIRED
    with pytest.raises(JobFailed):
        plant.celery_result(job.id).get(timeout=10)


@pytest.mark.holds("docs/operations.md#how-long-may-a-job-take", "`deadline_seconds` | `DEADLINE_EXCEEDED`")
def test_deadline_ends_a_generation_that_runs(plant: Plant) -> None:
    job = plant.client.submit(prompt="go on", deadline_seconds=0.5, generation=endlessly())
    assert plant.fail(job).code is ErrorCode.DEADLINE_EXCEEDED
    assert job.state is JobState.EXPIRED


@pytest.fixture
def limits(plant: Plant) -> Iterator[Callable[..., Analyst]]:
    """Has the worker let an attempt, or its generation, take so many seconds."""
    usual = plant.app.analyst

    def limit(**seconds: float) -> Analyst:
        bench = replace(plant.bench, **seconds)
        work = WorkClock(plant.redis, concurrency=1)
        parts = (plant.leases, plant.renewal, plant.settlement, plant.outbox, work, usual.fitness)
        plant.app.analyst = Analyst(bench, *parts)
        return plant.app.analyst

    yield limit
    plant.app.analyst = usual


@pytest.mark.holds(
    "docs/reliability.md#promises",
    "Fetching, decoding, generating and the",
)
@pytest.mark.holds(
    "docs/operations.md#how-long-may-a-job-take",
    "the generation | `KEYE_MAX_GENERATE_SECONDS`",
    "the whole attempt | `KEYE_MAX_ATTEMPT_SECONDS`",
)
@pytest.mark.parametrize("setting", ["max_generate_seconds", "max_attempt_seconds"])
def test_a_generation_that_outlasts_a_limit_of_the_worker_fails_and_says_which(
    plant: Plant, limits: Callable[..., Analyst], setting: str
) -> None:
    limits(**{setting: 0.3})
    failed = plant.fail(plant.client.submit(prompt="go on", generation=endlessly(), max_attempts=3))
    assert failed.code is ErrorCode.TIME_LIMIT_EXCEEDED
    assert (failed.failure.stage, failed.failure.attempts) == (Stage.GENERATE, 1)
    assert f"the limit is 0.3 s (KEYE_{setting.upper()})" in failed.failure.message
    assert failed.failure.partial is not None


def test_job_that_hangs_in_its_thread_is_ended_from_outside_and_its_late_result_discarded(
    plant: Plant,
    limits: Callable[..., Analyst],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", logger="keye.worker.results.settlement")
    monkeypatch.setattr(stragglers, "GRACE_SECONDS", 0)
    with FaultyProcessor.held_up():
        hanging = limits(max_attempt_seconds=0.2).stragglers
        job = plant.client.submit(a_job(prompt="wait", metadata={"order": 7}))
        eventually(hanging.end_overdue)
        failed = plant.fail(job)
        assert [seconds > 0 for seconds in hanging.end_overdue().values()] == [True]
    assert failed.code is ErrorCode.TIME_LIMIT_EXCEEDED
    assert (failed.failure.stage, failed.failure.metadata) == (Stage.PREPARE, {"order": 7})
    with pytest.raises(JobFailed, match="KEYE_MAX_ATTEMPT_SECONDS"):
        plant.celery_result(job.id).get(timeout=10)
    eventually(lambda: not state.active_requests)
    assert ends(caplog.records, job.id) == ["FAILED"]


@pytest.mark.holds(
    "docs/celery.md#cancel",
    "A running one stops at",
)
def test_cancelling_a_running_job_ends_it_at_the_next_step(plant: Plant) -> None:
    job = plant.client.submit(prompt="go on", generation=endlessly())
    eventually(lambda: generating(plant, job.id))
    job.cancel()
    plant.renewal.turn()
    failed = plant.fail(job)
    assert failed.code is ErrorCode.CANCELLED
    assert failed.failure.stage is Stage.GENERATE
    assert job.state is JobState.CANCELLED


def test_cancelling_before_the_engine_has_the_job_counts_too(plant: Plant) -> None:
    with FaultyProcessor.held_up() as is_held:
        job = plant.client.submit(a_job(prompt="wait"))
        assert is_held.wait(30)
        job.cancel()
        plant.renewal.turn()
    failed = plant.fail(job)
    assert failed.code is ErrorCode.CANCELLED
    assert failed.failure.stage is Stage.PREPARE


def test_attempt_that_lost_its_lease_stops_and_writes_nothing(plant: Plant) -> None:
    job = plant.client.submit(prompt="go on", generation=endlessly())
    eventually(lambda: generating(plant, job.id))
    plant.redis.hset(keys.record(job.id), "token", "another's")
    plant.redis.zrem(keys.LEASES, job.id)
    before = plant.record(job.id)
    plant.renewal.turn()

    eventually(lambda: plant.redis.hlen(UNACKED) == 0)
    assert plant.record(job.id) == before
    assert plant.celery_result(job.id).state == "PENDING"


def test_cancelling_between_two_attempts_ends_the_job_for_good(plant: Plant) -> None:
    FaultyProcessor.misfortunes.append(
        Fault(ErrorCode.MEDIA_UNREACHABLE, "s3://b/k: answered 503.", retry_after_seconds=60)
    )
    job = plant.client.submit(a_job())
    eventually(lambda: "due_at" in plant.record(job.id))
    assert job.cancel() is Cancellation.CANCELLED
    assert plant.fail(job).code is ErrorCode.CANCELLED
    a_reaper(plant).reap_overdue()
    with pytest.raises(JobFailed):
        plant.celery_result(job.id).get(timeout=10)
