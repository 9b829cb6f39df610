"""Deliveries through a real Celery worker, server, engine and decoders, with a model of random weights.

Only the faults that real parts would not have on demand are put in by hand.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from celery import Celery
from celery.contrib.testing.worker import start_worker
from celery.result import AsyncResult
from PIL import Image
from pydantic import SecretStr
from redis import Redis

from config import keys
from config.error_codes import ErrorCode
from config.event import EVENT, JobEnded, Stage, StageStarted
from config.history import FailedAttempt
from config.job import AnalysisJob, Priority
from config.outcome import JobFailed, JobResult, ModelIdentity, WorkerIdentity
from config.settings import Settings
from config.state import JobState
from config.topology import ANALYZE_TASK, QUEUE, UNACKED, message_list
from config.wire import SealedJob, seal
from producer import Cancellation, Client, Job
from tests.conditions import eventually
from tests.zoo import encode_clip, steady_times
from worker.engine.inbox import GenerationFault, Inbox, PendingGeneration
from worker.engine.step_loop import Engine
from worker.leases.connection import connect
from worker.leases.job_lease import Claimed, LeaseStore, QueuedJob
from worker.leases.reaper import Reaper
from worker.leases.renewal import LeaseRenewal
from worker.media.prepare import DecoderPool, MediaCache, MediaFault, MediaLimits
from worker.model.load import load_model
from worker.model.processor import KeyeProcessor, PreparedPrompt
from worker.results.event_writer import EventWriter
from worker.results.outbox import Outbox
from worker.results.settlement import Settlement
from worker.results.spool import Spool
from worker.tasks import stragglers
from worker.tasks.analyze import Analyst
from worker.tasks.attempt import Workbench
from worker.tasks.celery_app import build_app
from worker.tasks.sampling_defaults import SamplingDefaults
from worker.tasks.stranded import StrandedJobs

CHECKPOINT = Path(__file__).parents[1] / "golden" / "preview" / "checkpoint"
CONCURRENCY = 4
# Short, so that messages of held-up jobs come back while a test waits.
LEASE_SECONDS = 1
# A fault that a job may ask for, by its prompt.
FAULTS = {
    "SystemExit": SystemExit,
    "KeyboardInterrupt": KeyboardInterrupt,
    "MemoryError": MemoryError,
    "ValueError": ValueError,
}


class FaultyProcessor(KeyeProcessor):
    """The real one, but it breaks on request, and it can be held up to catch a job while it runs."""

    gate = threading.Event()
    gate.set()
    # What the next preparations raise, one each.
    misfortunes: ClassVar[list[Exception]] = []

    def prepare(self, messages: Any, *args: Any, **kwargs: Any) -> PreparedPrompt:
        if self.misfortunes:
            raise self.misfortunes.pop()
        last = messages[-1]["content"][-1]["text"]
        if last.startswith("break with "):
            raise FAULTS[last.removeprefix("break with ")](f"a secret in {last}")
        if last == "wait":
            assert self.gate.wait(30)
        return super().prepare(messages, *args, **kwargs)


class FaultyInbox(Inbox):
    """The engine's own, but on request its device has no memory left."""

    misfortunes: ClassVar[list[Exception]] = []

    def __init__(self, inbox: Inbox) -> None:
        super().__init__(inbox.max_tokens)
        self._inbox = inbox

    def submit(self, *args: Any, **kwargs: Any) -> PendingGeneration:
        if self.misfortunes:
            raise self.misfortunes.pop()
        return self._inbox.submit(*args, **kwargs)


class FaultyEvents(EventWriter):
    """Writes events, but raises what is told once one is to be written that holds the text told."""

    misfortunes: ClassVar[dict[str, BaseException]] = {}

    def write(self, lease: Claimed, events: list[str]) -> bool:
        for text in self.misfortunes:
            if any(text in event for event in events):
                raise self.misfortunes.pop(text)
        return super().write(lease, events)


class FaultySettlement(Settlement):
    """Writes outcomes, but raises what is told for the next."""

    misfortunes: ClassVar[list[BaseException]] = []

    def settle(self, *args: Any) -> bool:
        if self.misfortunes:
            raise self.misfortunes.pop()
        return super().settle(*args)


@dataclass
class Plant:
    """Everything of one worker that a test may want to touch."""

    app: Celery
    bench: Workbench
    worker: Any
    client: Client
    redis: Redis
    leases: LeaseStore
    renewal: LeaseRenewal
    settlement: Settlement
    engine: Engine
    outbox: Outbox
    media: Path

    def finish(self, job: Job) -> JobResult:
        return job.result(timeout=60)

    def fail(self, job: Job) -> JobFailed:
        with pytest.raises(JobFailed) as caught:
            job.result(timeout=60)
        return caught.value

    def celery_result(self, job_id: str) -> AsyncResult:
        return AsyncResult(job_id, app=self.app)

    def send(self, payload: Any, task_id: str) -> AsyncResult:
        """A message by hand, without a record, as a producer in another language sends it."""
        return self.app.send_task(ANALYZE_TASK, kwargs={"sealed": payload}, task_id=task_id, queue=QUEUE, priority=3)

    def record(self, job_id: str) -> dict[str, str]:
        return self.redis.hgetall(keys.record(job_id))


@pytest.fixture(scope="module")
def plant(valkey_url: str, decoders: DecoderPool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plant]:
    media = tmp_path_factory.mktemp("media")
    settings = Settings(
        redis_url=SecretStr(valkey_url), media_roots=(media,), concurrency=CONCURRENCY, lease_seconds=LEASE_SECONDS
    )
    redis = connect(valkey_url)
    redis.flushall()
    processor = FaultyProcessor.from_checkpoint(CHECKPOINT)
    engine = Engine(load_model(CHECKPOINT, dtype=torch.float32, device="cpu"), processor, kv_cache_bytes=2**26)
    engine.start()
    leases = LeaseStore(redis, settings.lease_seconds)
    renewal = LeaseRenewal(leases)
    renewal.start()
    settlement = FaultySettlement(redis, settings.result_ttl_seconds, settings.dead_letter_ttl_seconds)
    bench = Workbench(
        inbox=FaultyInbox(engine.inbox),
        processor=processor,
        sampling=SamplingDefaults.from_checkpoint(CHECKPOINT),
        media_limits=MediaLimits.of(settings),
        media_cache=MediaCache(tmp_path_factory.mktemp("cache"), max_bytes=0),
        decoders=decoders,
        events=FaultyEvents(redis),
        model=ModelIdentity(name="random", model_type="Keye", precision="float32"),
        worker=WorkerIdentity(host="here", pid=1, device="cpu"),
    )
    app = build_app(settings)
    outbox = Outbox(settlement, Spool(tmp_path_factory.mktemp("spool")), leases.patience)
    app.analyst = Analyst(bench, leases, renewal, settlement, outbox)
    with (
        start_worker(
            app, pool="threads", concurrency=CONCURRENCY, perform_ping_check=False, loglevel="warning"
        ) as worker,
        Client(settings) as client,
    ):
        yield Plant(app, bench, worker, client, redis, leases, renewal, settlement, engine, outbox, media)
    renewal.stop()
    engine.stop()
    app.close()
    redis.flushall()
    redis.close()


@pytest.fixture
def picture(plant: Plant) -> str:
    path = plant.media / "picture.png"
    Image.new("RGB", (120, 90), "teal").save(path)
    return str(path)


@pytest.fixture(scope="module")
def clip(plant: Plant) -> str:
    return str(encode_clip(plant.media / "short.mp4", steady_times(8)))


def briefly(**options: Any) -> dict[str, Any]:
    return {"max_new_tokens": 6, "temperature": 0, **options}


def a_job(**options: Any) -> AnalysisJob:
    return AnalysisJob.model_validate({"prompt": "what?", "generation": briefly(), **options})


def test_image_job_ends_with_a_result_that_tells_how_it_came_about(plant: Plant, picture: str) -> None:
    job = plant.client.submit(
        prompt="what?", media=[picture], generation=briefly(), metadata={"order": 7}, thinking="no_think"
    )
    result = plant.finish(job)

    assert job.state is JobState.SUCCEEDED
    assert result.attempts == 1
    assert result.metadata == {"order": 7}
    assert result.model.name == "random"
    (seen,) = result.media
    assert (seen.type, seen.original_size, seen.resized_size) == ("image", (90, 120), (84, 112))
    assert seen.visual_tokens == result.usage.visual_tokens == 12
    assert 12 < result.usage.prompt_tokens < 100
    assert 1 <= result.usage.completion_tokens <= 6
    timings = result.timings
    assert 0 < timings.fetch + timings.decode + timings.prepare + timings.generate <= timings.total
    assert timings.first_token is not None


def test_celery_result_is_the_outcome_for_who_knows_celery_only(plant: Plant) -> None:
    job = plant.client.submit(a_job())
    result = plant.finish(job)
    assert JobResult.model_validate(plant.celery_result(job.id).get(timeout=10)) == result


def test_events_tell_the_stages_in_order(plant: Plant, picture: str) -> None:
    job = plant.client.submit(prompt="what?", media=[picture], generation=briefly())
    *told, last = job.events(timeout=60)
    assert [event.stage for event in told if isinstance(event, StageStarted)] == [
        Stage.OPEN,
        Stage.FETCH,
        Stage.DECODE,
        Stage.PREPARE,
        Stage.GENERATE,
    ]
    assert isinstance(last, JobEnded)
    assert last.state is JobState.SUCCEEDED


def test_video_is_sampled_and_told_of(plant: Plant, picture: str) -> None:
    clip = encode_clip(plant.media / "clip.mp4", steady_times(60))
    job = plant.client.submit(prompt="what moves?", media=[picture, str(clip), picture], generation=briefly())
    seen = plant.finish(job).media

    assert [medium.type for medium in seen] == ["image", "video", "image"]
    assert seen[1].frames == 4
    assert seen[1].fps == pytest.approx(2, rel=0.05)
    assert seen[1].duration_seconds == pytest.approx(2, rel=0.05)
    height, width = seen[1].resized_size
    assert seen[1].visual_tokens == 4 * height * width // 28**2


def test_chat_with_several_turns_and_media_is_read_whole(plant: Plant, picture: str) -> None:
    turns = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "image", "uri": picture}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": "teal"},
        {"role": "user", "content": [{"type": "text", "text": "sure?"}]},
    ]
    result = plant.finish(plant.client.submit(messages=turns, generation=briefly()))
    assert len(result.media) == 1


def test_same_seed_gives_the_same_text(plant: Plant) -> None:
    options = {"max_new_tokens": 12, "temperature": 1.5, "seed": 5}
    first, second = (plant.finish(plant.client.submit(prompt="sing", generation=options)) for _ in range(2))
    assert first.raw_text == second.raw_text


def test_the_log_tells_why_a_job_failed(plant: Plant, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="worker.tasks.analyze")
    failed = plant.fail(plant.client.submit(prompt="what?", media=[str(plant.media / "no\nthing.jpg")]))
    begins = f"job {failed.failure.job_id}: FAILED"
    eventually(lambda: any(line.startswith(begins) for line in caplog.messages))
    (ending,) = [line for line in caplog.messages if line.startswith(begins)]
    assert ending.endswith(f"in fetch: MEDIA_NOT_FOUND: {failed.failure.message!r}")
    assert "\n" not in ending


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


@pytest.mark.parametrize("payload", [None, [], {"schema_version": 1}, {"schema_version": 1, "job_id": 5}])
def test_message_without_a_usable_job_fails_under_its_celery_id(plant: Plant, payload: Any) -> None:
    task_id = f"unreadable-{json.dumps(payload)}"
    with pytest.raises(JobFailed) as caught:
        plant.send(payload, task_id).get(timeout=20)
    assert caught.value.code is ErrorCode.INVALID_JOB
    assert caught.value.failure.stage is Stage.OPEN
    assert plant.record(task_id)["state"] == JobState.FAILED


def test_job_published_without_a_record_is_answered_and_gets_one(plant: Plant) -> None:
    sealed = seal(a_job())
    result = plant.send(sealed.model_dump(mode="json"), sealed.job_id).get(timeout=20)
    assert JobResult.model_validate(result) == plant.finish(plant.client.find(sealed.job_id))
    assert SealedJob.model_validate_json(plant.record(sealed.job_id)["sealed"]) == sealed


def test_second_delivery_of_a_settled_job_does_no_work_and_finds_the_outcome(plant: Plant) -> None:
    sealed = seal(a_job())
    payload = sealed.model_dump(mode="json")
    first = plant.send(payload, sealed.job_id).get(timeout=20)
    ended_at = plant.record(sealed.job_id)["ended_at"]

    again = plant.send(payload, f"{sealed.job_id}-again").get(timeout=20)
    assert again == first
    assert plant.record(sealed.job_id)["ended_at"] == ended_at
    assert plant.record(sealed.job_id)["attempts"] == "1"


def test_second_delivery_of_a_running_job_leaves_its_result_alone(plant: Plant) -> None:
    FaultyProcessor.gate.clear()
    job = plant.client.submit(a_job(prompt="wait"))
    try:
        eventually(lambda: job.state is JobState.RUNNING)
        sealed = json.loads(plant.record(job.id)["sealed"])
        second = plant.send(sealed, f"{job.id}-second")
        eventually(lambda: plant.redis.llen(QUEUE) == 0 and plant.redis.hlen(UNACKED) <= 1)
    finally:
        FaultyProcessor.gate.set()
    assert plant.finish(job).attempts == 1
    assert second.state == "PENDING", "acknowledged without a result"


def test_job_longer_than_every_timeout_runs_once(plant: Plant) -> None:
    FaultyProcessor.gate.clear()
    job = plant.client.submit(a_job(prompt="wait"))
    try:
        eventually(lambda: job.state is JobState.RUNNING)
        # The broker gave its message to a worker again, which acknowledged it without work.
        eventually(lambda: plant.redis.hlen(UNACKED) == 0 and plant.redis.llen(QUEUE) == 0)
        assert job.state is JobState.RUNNING
    finally:
        FaultyProcessor.gate.set()
    result = plant.finish(job)
    assert result.attempts == 1
    assert JobResult.model_validate(plant.celery_result(job.id).get(timeout=10)) == result


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
    FaultyProcessor.misfortunes.append(MediaFault(ErrorCode.MEDIA_UNREACHABLE, "s3://b/k: answered 503.", 60))
    job = plant.client.submit(a_job(deadline_seconds=600, metadata={"order": 7}))
    eventually(lambda: "due_at" in plant.record(job.id))
    plant.redis.hset(keys.record(job.id), "deadline_at", time.time() - 1)
    plant.redis.zadd(keys.deadlines(), {job.id: time.time() - 1})
    a_reaper(plant).look_around()

    failed = plant.fail(job)
    assert failed.code is ErrorCode.DEADLINE_EXCEEDED
    assert (failed.failure.stage, failed.failure.attempts, failed.failure.metadata) == (Stage.QUEUED, 1, {"order": 7})
    assert job.state is JobState.EXPIRED
    with pytest.raises(JobFailed):
        plant.celery_result(job.id).get(timeout=10)


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
        plant.app.analyst = Analyst(bench, plant.leases, plant.renewal, plant.settlement, plant.outbox)
        return plant.app.analyst

    yield limit
    plant.app.analyst = usual


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
    plant: Plant, limits: Callable[..., Analyst], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stragglers, "GRACE_SECONDS", 0)
    FaultyProcessor.gate.clear()
    try:
        hanging = limits(max_attempt_seconds=0.2).stragglers
        job = plant.client.submit(a_job(prompt="wait", metadata={"order": 7}))
        eventually(hanging.end_overdue)
        failed = plant.fail(job)
        assert [seconds > 0 for seconds in hanging.end_overdue().values()] == [True]
    finally:
        FaultyProcessor.gate.set()
    assert failed.code is ErrorCode.TIME_LIMIT_EXCEEDED
    assert (failed.failure.stage, failed.failure.metadata) == (Stage.PREPARE, {"order": 7})
    with pytest.raises(JobFailed, match="KEYE_MAX_ATTEMPT_SECONDS"):
        plant.celery_result(job.id).get(timeout=10)
    eventually(lambda: not hanging.end_overdue())


def test_cancelling_a_running_job_ends_it_at_the_next_step(plant: Plant) -> None:
    job = plant.client.submit(prompt="go on", generation=endlessly())
    eventually(lambda: generating(plant, job.id))
    job.cancel()
    plant.renewal.renew_all()
    failed = plant.fail(job)
    assert failed.code is ErrorCode.CANCELLED
    assert failed.failure.stage is Stage.GENERATE
    assert job.state is JobState.CANCELLED


def test_cancelling_before_the_engine_has_the_job_counts_too(plant: Plant) -> None:
    FaultyProcessor.gate.clear()
    job = plant.client.submit(a_job(prompt="wait"))
    try:
        eventually(lambda: job.state is JobState.RUNNING)
        job.cancel()
        plant.renewal.renew_all()
    finally:
        FaultyProcessor.gate.set()
    failed = plant.fail(job)
    assert failed.code is ErrorCode.CANCELLED
    assert failed.failure.stage is Stage.PREPARE


def test_attempt_that_lost_its_lease_stops_and_writes_nothing(plant: Plant) -> None:
    job = plant.client.submit(prompt="go on", generation=endlessly())
    eventually(lambda: generating(plant, job.id))
    plant.redis.hset(keys.record(job.id), "token", "another's")
    plant.redis.zrem(keys.leases(), job.id)
    before = plant.record(job.id)
    plant.renewal.renew_all()

    eventually(lambda: plant.redis.hlen(UNACKED) == 0)
    assert plant.record(job.id) == before
    assert plant.celery_result(job.id).state == "PENDING"


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


def test_job_of_a_dead_worker_is_answered_by_a_living_one(plant: Plant) -> None:
    sealed = seal(a_job())
    dead, reaper = a_dead_worker(plant, sealed)
    eventually(lambda: sealed.job_id in dead.overdue(10))
    reaper.reap_overdue()
    assert plant.finish(plant.client.find(sealed.job_id)).attempts == 2


def test_record_without_a_readable_job_ends_as_a_failure(plant: Plant) -> None:
    plant.redis.hset(keys.record("scribbled"), mapping={"state": "QUEUED", "sealed": "{'not': JSON}"})
    plant.redis.zadd(keys.leases(), {"scribbled": time.time() - 1})
    a_reaper(plant).reap_overdue()
    assert plant.fail(plant.client.find("scribbled")).code is ErrorCode.INVALID_JOB


def test_job_that_killed_its_last_worker_ends_with_worker_lost(plant: Plant) -> None:
    sealed = seal(a_job(max_attempts=1, metadata={"order": 7}))
    dead, reaper = a_dead_worker(plant, sealed)
    eventually(lambda: sealed.job_id in dead.overdue(10))
    reaper.reap_overdue()
    assert plant.client.find(sealed.job_id).state is JobState.FAILED

    failed = plant.fail(plant.client.find(sealed.job_id))
    assert failed.code is ErrorCode.WORKER_LOST
    assert "worker-that-died" in failed.failure.message
    assert failed.failure.metadata == {"order": 7}
    with pytest.raises(JobFailed):
        plant.celery_result(sealed.job_id).get(timeout=10)


def test_store_that_is_away_for_a_moment_costs_an_attempt_and_no_answer(plant: Plant) -> None:
    FaultyProcessor.misfortunes.append(MediaFault(ErrorCode.MEDIA_UNREACHABLE, "s3://b/k: answered 503 SlowDown.", 0.3))
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


def test_job_too_large_for_the_memory_is_answered_from_half_of_the_pixels(plant: Plant) -> None:
    path = plant.media / "large.png"
    Image.new("RGB", (560, 560), "teal").save(path)
    whole = plant.finish(plant.client.submit(prompt="what?", media=[str(path)], generation=briefly()))
    FaultyInbox.misfortunes.append(GenerationFault(ErrorCode.OUT_OF_MEMORY, "too large"))
    job = plant.client.submit(prompt="what?", media=[str(path)], generation=briefly())
    eventually(lambda: "due_at" in plant.record(job.id))

    result = finish_with_reaper(plant, job)
    assert 0 < result.usage.visual_tokens <= whole.usage.visual_tokens // 2
    (warning,) = result.warnings
    assert f"{result.usage.visual_tokens} visual tokens" in warning
    assert "memory" in warning


def test_cancelling_between_two_attempts_ends_the_job_for_good(plant: Plant) -> None:
    FaultyProcessor.misfortunes.append(MediaFault(ErrorCode.MEDIA_UNREACHABLE, "s3://b/k: answered 503.", 60))
    job = plant.client.submit(a_job())
    eventually(lambda: "due_at" in plant.record(job.id))
    assert job.cancel() is Cancellation.CANCELLED
    assert plant.fail(job).code is ErrorCode.CANCELLED
    a_reaper(plant).reap_overdue()
    with pytest.raises(JobFailed):
        plant.celery_result(job.id).get(timeout=10)


def test_last_attempt_that_fails_is_the_outcome(plant: Plant) -> None:
    FaultyProcessor.misfortunes.append(MediaFault(ErrorCode.MEDIA_UNREACHABLE, "s3://b/k: answered 503."))
    failed = plant.fail(plant.client.submit(a_job(max_attempts=1)))
    assert failed.code is ErrorCode.MEDIA_UNREACHABLE
    assert failed.failure.attempts == 1


def test_job_that_may_have_killed_its_workers_runs_with_nothing_beside_it(plant: Plant) -> None:
    sealed = seal(a_job(prompt="wait", max_attempts=4))
    for _ in range(2):
        dead, reaper = a_dead_worker(plant, sealed)
        eventually(lambda: sealed.job_id in dead.overdue(10))  # noqa: B023
        dead.reap(sealed.job_id, "reaper")
    FaultyProcessor.gate.clear()
    try:
        reaper.start()
        suspect = plant.client.find(sealed.job_id)
        eventually(lambda: suspect.state is JobState.RUNNING)
        neighbour = plant.client.submit(a_job())
        eventually(lambda: plant.redis.llen(message_list(Priority.NORMAL)) == 0)
        assert neighbour.state is JobState.QUEUED
    finally:
        FaultyProcessor.gate.set()
        reaper.stop()
    assert plant.finish(suspect).attempts == 3
    assert plant.finish(neighbour).attempts == 1


def test_worker_does_not_gossip_however_it_is_started(plant: Plant) -> None:
    started = {type(step).__name__ for step in plant.worker.consumer.steps}
    assert "Tasks" in started
    assert not started & {"Gossip", "Mingle", "Heart"}


def a_dead_worker(plant: Plant, sealed: SealedJob) -> tuple[LeaseStore, Reaper]:
    """One that claimed the job for a short time and was never heard of again, and who finds out."""
    dead = LeaseStore(plant.redis, lease_seconds=0.2)
    assert isinstance(dead.claim(QueuedJob.of(sealed), "worker-that-died"), Claimed)
    return dead, a_reaper(plant)


def a_reaper(plant: Plant) -> Reaper:
    jobs = StrandedJobs(plant.settlement)
    return Reaper(plant.leases, "reaper", lambda: None, jobs.bury, jobs.expire)


def finish_with_reaper(plant: Plant, job: Job) -> JobResult:
    """Its next attempt comes by a reaper, as any worker runs one."""
    reaper = a_reaper(plant)
    reaper.start()
    try:
        return plant.finish(job)
    finally:
        reaper.stop()


def endlessly() -> dict[str, Any]:
    """Greedy, this checkpoint falls into a loop and goes on for longer than any test."""
    return {"max_new_tokens": 30_000, "temperature": 0}


def generating(plant: Plant, job_id: str) -> bool:
    return any(
        json.loads(fields["event"]).get("stage") == Stage.GENERATE
        for _, fields in plant.redis.xrange(keys.events(job_id))
    )
