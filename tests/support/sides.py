"""The side of the worker for tests of clients, and every client behind one face, so that one suite holds for all."""

import asyncio
import inspect
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from types import SimpleNamespace
from typing import Any

from redis import Redis

from keye.config import keys
from keye.config.codes import ErrorCode, Stage
from keye.config.event import Event, FramesDecoded, StageStarted, TextGenerated
from keye.config.job import AnalysisJob
from keye.config.outcome import JobFailure, JobResult, ModelIdentity, StageTimings, TokenUsage, WorkerIdentity
from keye.config.wire import open_sealed
from keye.producer import AsyncClient, AsyncJob
from keye.worker.leases.claims import Claimed, QueuedJob
from keye.worker.leases.job_lease import LeaseStore
from keye.worker.results.settlement import Settlement


class RedisWorker:
    """Does to jobs in Redis by the real scripts what `keye.testing.MemoryClient` does to those in memory."""

    def __init__(self, redis: Redis, result_ttl_seconds: int = 3600) -> None:
        self._redis = redis
        self._store = LeaseStore(redis, lease_seconds=30)
        self._settlement = Settlement(redis, result_ttl_seconds, 3600)
        self._leases: dict[str, Claimed] = {}
        self._written: dict[str, str] = {}

    @property
    def jobs(self) -> list[SimpleNamespace]:
        """Those that wait, with their ids."""
        return [SimpleNamespace(id=job_id) for job_id in self._redis.zrange(keys.queued("normal"), 0, -1)]

    def asked(self, job: Any) -> AnalysisJob:
        return open_sealed(json.loads(self._store.sealed(job.id))).job

    def start(self, job: Any, stage: Stage = Stage.GENERATE) -> None:
        lease = self._lease(job)
        self._say(job, StageStarted(stage=stage, attempt=lease.attempt, at=time.time()))

    def decode(self, job: Any, done: int, total: int, media_index: int = 0) -> None:
        attempt = self._lease(job).attempt
        self._say(job, FramesDecoded(media_index=media_index, done=done, total=total, attempt=attempt, at=time.time()))

    def write(self, job: Any, text: str) -> None:
        before = self._written.get(job.id, "")
        self._written[job.id] = before + text
        num_tokens, attempt = len(self._written[job.id].split()), self._lease(job).attempt
        text_of = {"channel": "answer", "text": text, "offset": len(before), "num_tokens": num_tokens}
        self._say(job, TextGenerated(**text_of, attempt=attempt, at=time.time()))

    def lose(self, job: Any) -> None:
        self._redis.zadd(keys.LEASES, {job.id: 0})
        requeued = self._store.reap(job.id, "reaper")
        self._store.publish(requeued)
        del self._leases[job.id]
        self._written.pop(job.id, None)

    def answer(self, job: Any, text: str | None = None) -> None:
        lease = self._lease(job)
        if text is not None and job.id not in self._written:
            self.write(job, text)
        answer = self._written.get(job.id, "")
        result = JobResult(
            job_id=job.id,
            answer=answer,
            reasoning=None,
            raw_text=answer,
            finish_reason="stop",
            usage=TokenUsage(prompt_tokens=9, visual_tokens=4, completion_tokens=len(answer.split())),
            timings=StageTimings(),
            media=(),
            model=ModelIdentity(name="keye", model_type="KeyeVL", precision="float32"),
            worker=WorkerIdentity(host="here", pid=1, device="cpu"),
            attempts=lease.attempt,
        )
        assert self._settlement.settle(lease, result)

    def fail(self, job: Any, code: ErrorCode, message: str = "as the test said") -> None:
        lease = self._lease(job)
        facts = {"stage": Stage.GENERATE, "retryable": code.facts.retryable, "attempts": lease.attempt}
        assert self._settlement.settle(lease, JobFailure(job_id=job.id, code=code, message=message, **facts))

    def forget(self, job: Any) -> None:
        self._redis.delete(keys.record(job.id), keys.events(job.id))

    def _lease(self, job: Any) -> Claimed:
        if job.id not in self._leases:
            claimed = self._store.claim(QueuedJob(job.id, {}), "worker-1")
            assert isinstance(claimed, Claimed)
            self._leases[job.id] = claimed
        return self._leases[job.id]

    def _say(self, job: Any, event: Event) -> None:
        self._redis.xadd(keys.events(job.id), {"event": event.model_dump_json()})


class Synchronous:
    """An `AsyncClient` or `AsyncJob` on a loop of another thread, with the synchronous client's verbs."""

    def __init__(self, inner: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._inner, self._loop = inner, loop

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if not callable(value):
            return self._told(value)
        return lambda *given, **named: self._told(value(*map(_unwrapped, given), **named))

    def _told(self, value: Any) -> Any:
        if inspect.isawaitable(value):
            return self._told(asyncio.run_coroutine_threadsafe(_awaited(value), self._loop).result())
        if isinstance(value, AsyncIterator):
            return self._each(value)
        if isinstance(value, AsyncJob):
            return Synchronous(value, self._loop)
        if type(value) in (list, tuple):
            return type(value)(map(self._told, value))
        return value

    def _each(self, values: AsyncIterator[Any]) -> Iterator[Any]:
        while (value := self._told(_next(values))) is not _END:
            yield value


_END = object()


async def _next(values: AsyncIterator[Any]) -> Any:
    return await anext(values, _END)


async def _awaited(value: Any) -> Any:
    return await value


def _unwrapped(value: Any) -> Any:
    if isinstance(value, list):
        return [_unwrapped(each) for each in value]
    return value._inner if isinstance(value, Synchronous) else value


def synchronously(make: Callable[[], AsyncClient]) -> Iterator[Synchronous]:
    """The client that `make` makes, on a loop that runs until the iterator goes on."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    client = Synchronous(make(), loop)
    try:
        yield client
    finally:
        client.close()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
