"""One worker for deliveries: real but for the faults that real parts would not have on demand."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
from celery import Celery
from celery.result import AsyncResult
from redis import Redis

from keye.config import keys
from keye.config.codes import Stage
from keye.config.faults import JobFailed
from keye.config.job import AnalysisJob
from keye.config.outcome import JobResult
from keye.config.topology import ANALYZE_TASK, QUEUE
from keye.config.wire import SealedJob
from keye.producer import Client, Job
from keye.worker.engine.inbox import Inbox, PendingGeneration
from keye.worker.engine.step_loop import Engine
from keye.worker.leases.claims import Claimed, QueuedJob
from keye.worker.leases.job_lease import LeaseStore
from keye.worker.leases.reaper import Reaper
from keye.worker.leases.renewal import LeaseRenewal
from keye.worker.model.processor import KeyeProcessor, PreparedPrompt
from keye.worker.results.event_writer import EventWriter
from keye.worker.results.outbox import Outbox
from keye.worker.results.settlement import Settlement
from keye.worker.tasks.stragglers import dead_letter, expire
from keye.worker.tasks.workbench import Workbench

CHECKPOINT = Path(__file__).parents[2] / "golden" / "preview" / "checkpoint"
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
    is_held = threading.Event()
    # What the next preparations raise, one each.
    misfortunes: ClassVar[list[Exception]] = []

    @classmethod
    @contextmanager
    def held_up(cls) -> Iterator[threading.Event]:
        """Jobs with the prompt `wait` stay in their preparation meanwhile; the event tells that one does."""
        cls.gate.clear()
        cls.is_held.clear()
        try:
            yield cls.is_held
        finally:
            cls.gate.set()

    def prepare_text(self, messages: Any, *args: Any, **kwargs: Any) -> PreparedPrompt:
        if self.misfortunes:
            raise self.misfortunes.pop()
        last = _last_text(messages[-1]["content"])
        if last.startswith("break with "):
            raise FAULTS[last.removeprefix("break with ")](f"a secret in {last}")
        if last == "wait":
            self.is_held.set()
            assert self.gate.wait(30)
        return super().prepare_text(messages, *args, **kwargs)


def _last_text(content: str | list[dict[str, str]]) -> str:
    return content if isinstance(content, str) else content[-1].get("text", "") if content else ""


class FaultyInbox(Inbox):
    """The engine's own, but on request its device has no memory left."""

    misfortunes: ClassVar[list[Exception]] = []

    def __init__(self, inbox: Inbox) -> None:
        super().__init__(inbox.max_tokens)
        self._inbox = inbox
        self.submitted: list[PendingGeneration] = []

    def submit(self, *args: Any, **kwargs: Any) -> PendingGeneration:
        if self.misfortunes:
            raise self.misfortunes.pop()
        self.submitted.append(self._inbox.submit(*args, **kwargs))
        return self.submitted[-1]


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


def briefly(**options: Any) -> dict[str, Any]:
    return {"max_new_tokens": 6, "temperature": 0, **options}


def endlessly() -> dict[str, Any]:
    """Greedy, this checkpoint falls into a loop and goes on for longer than any test."""
    return {"max_new_tokens": 30_000, "temperature": 0}


def a_job(**options: Any) -> AnalysisJob:
    return AnalysisJob.model_validate({"prompt": "what?", "generation": briefly(), **options})


def generating(plant: Plant, job_id: str) -> bool:
    return any(
        json.loads(fields["event"]).get("stage") == Stage.GENERATE
        for _, fields in plant.redis.xrange(keys.events(job_id))
    )


def a_dead_worker(plant: Plant, sealed: SealedJob) -> tuple[LeaseStore, Reaper]:
    """One that claimed the job for a short time and was never heard of again, and who finds out."""
    dead = LeaseStore(plant.redis, lease_seconds=0.2)
    assert isinstance(dead.claim(QueuedJob.of(sealed), "worker-that-died"), Claimed)
    return dead, a_reaper(plant)


def a_reaper(plant: Plant) -> Reaper:
    return Reaper(plant.leases, "reaper", (), partial(dead_letter, plant.settlement), partial(expire, plant.settlement))


def finish_with_reaper(plant: Plant, job: Job) -> JobResult:
    """Its next attempt comes by a reaper, as any worker runs one."""
    with reaping(plant):
        return plant.finish(job)


@contextmanager
def reaping(plant: Plant) -> Iterator[None]:
    reaper = a_reaper(plant)
    reaper.start()
    try:
        yield
    finally:
        reaper.stop()
