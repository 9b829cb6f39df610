"""The same front door for asyncio. Nothing blocks the event loop, and who waits holds neither thread nor connection."""

import asyncio
import os
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack, overload

from keye.config.codes import JobState
from keye.config.event import EndedJob, EventsMissing, Heartbeat, JobEvent
from keye.config.faults import Refusal
from keye.config.job import AnalysisJob
from keye.config.outcome import JobResult
from keye.config.settings import ProducerSettings
from keye.config.wire import SealedJob
from keye.producer.batch.batch import Batch
from keye.producer.batch.progress import BatchProgress
from keye.producer.client import Client
from keye.producer.fields import BatchOptions, JobFields, JobOptions
from keye.producer.following import End, taken_async
from keye.producer.job import Cancellation, Job, result_of
from keye.producer.many import BATCHES_AHEAD, Awaited, InOrder, refused_as_full
from keye.producer.progress import Progress

if TYPE_CHECKING:
    from keye.producer.fields import Medium

# Of one client, for what is not waiting: reading and encoding media, uploads, a way to Redis and back.
MAX_THREADS = 16

T = TypeVar("T")


class AsyncClient:
    """`Client` for asyncio, with the same verbs, arguments and errors. One serves all tasks of an event loop.

    >>> async with AsyncClient("redis://127.0.0.1:6379/0") as client:
    ...     job = await client.submit(prompt="What is in the picture?", media=["s3://bucket/cat.jpg"])
    ...     async for event in job.events():
    ...         print(event)

    A task that is cancelled stops waiting at once; a job that it was submitting may be queued all the same.
    What is for operators (dead letters, quarantine, replay, status, lists of jobs, verify) has the synchronous client
    only.
    """

    def __init__(self, target: str | ProducerSettings | Client | None = None, *, key_prefix: str | None = None) -> None:
        """Both as for `Client`, or a client alone, which is then closed with this one."""
        self._client = target if isinstance(target, Client) else Client(target, key_prefix=key_prefix)
        self._begin_threads()

    async def submit(
        self, job: AnalysisJob | None = None, /, *, retry_failed: bool = False, **fields: Unpack[JobFields]
    ) -> "AsyncJob":
        """See `Client.submit`."""
        submit = partial(self._client.submit, job, retry_failed=retry_failed, **fields)
        return AsyncJob(await self._call(submit), self._call)

    async def submit_many(
        self, jobs: Iterable[AnalysisJob | Mapping[str, Any] | Refusal], retry_failed: bool = False
    ) -> "list[AsyncJob | Refusal]":
        """See `Client.submit_many`. `jobs` is gone through in a thread."""
        return self._handles(await self._call(lambda: self._client.submit_many(jobs, retry_failed)))

    async def find(self, job_id: str) -> "AsyncJob":
        """See `Client.find`."""
        return AsyncJob(await self._call(lambda: self._client.find(job_id)), self._call)

    async def results(
        self, jobs: "Iterable[AsyncJob | Refusal | str]", timeout: float | None = None
    ) -> "AsyncIterator[tuple[AsyncJob | Refusal, End]]":
        """See `Client.results`."""
        awaited = Awaited(AsyncJob(self._client.job(job), self._call) if isinstance(job, str) else job for job in jobs)
        for pair in awaited.refused:
            yield pair
        async for job_id, end in taken_async(self._client.follow_ends(awaited.by_id, timeout)):
            for job in awaited.by_id[job_id]:
                yield job, end

    async def map(
        self, prompt: str, media: "Iterable[Medium | Iterable[Medium]]", **options: Unpack[JobOptions]
    ) -> AsyncIterator[End]:
        """See `Client.map`."""
        ahead: deque[list[AsyncJob | Refusal]] = deque()
        batches = self._client.seal_about(media, prompt, options)
        # In a thread: media are read and encoded as they are gone through.
        while batch := await self._call(lambda: next(batches, [])):
            ahead.append(await self._send_patiently(batch))
            if len(ahead) == BATCHES_AHEAD:
                async for end in self._in_order(ahead.popleft()):
                    yield end
        for answers in ahead:
            async for end in self._in_order(answers):
                yield end

    async def submit_batch(
        self,
        source: str | os.PathLike[str],
        output: str | os.PathLike[str],
        prompt: str | None = None,
        **options: Unpack[BatchOptions],
    ) -> "AsyncBatch":
        """See `Client.submit_batch`."""
        submit = partial(self._client.submit_batch, source, output, prompt, **options)
        return AsyncBatch(await self._call(submit), self._call)

    async def _send_patiently(self, batch: list[SealedJob | Refusal]) -> "list[AsyncJob | Refusal]":
        answers = await self._call(lambda: self._client.send(batch))
        while full := refused_as_full(answers):
            await asyncio.sleep(max(full.values()))
            again = [batch[index] for index in full]
            for index, answer in zip(full, await self._call(partial(self._client.send, again)), strict=True):
                answers[index] = answer
        return self._handles(answers)

    def _handles(self, answers: list[Job | Refusal]) -> "list[AsyncJob | Refusal]":
        return [answer if isinstance(answer, Refusal) else AsyncJob(answer, self._call) for answer in answers]

    async def _in_order(self, answers: "list[AsyncJob | Refusal]") -> AsyncIterator[End]:
        in_order = InOrder(answers)
        async for job, end in self.results(answers):
            for each in in_order.add(job, end):
                yield each

    def watch(self, after: str | None = None, timeout: float | None = None) -> AsyncIterator[EndedJob]:
        """See `Client.watch`."""
        return taken_async(self._client.follow_feed(after, timeout))

    async def close(self) -> None:
        """Whoever waits hears it."""
        # Not by its own threads: they may all be busy with a server that is mute.
        await asyncio.to_thread(self._client.close)
        threads = self._threads
        self._begin_threads()
        threads.shutdown(wait=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def _call(self, action: Callable[[], T]) -> T:
        if self._pid != os.getpid():
            # After a fork it counts on threads that are the parent's.
            self._begin_threads()
        return await asyncio.get_running_loop().run_in_executor(self._threads, action)

    def _begin_threads(self) -> None:
        # They begin once there is something to do.
        self._threads, self._pid = ThreadPoolExecutor(MAX_THREADS, "keye-client"), os.getpid()


class AsyncJob:
    """`Job` for asyncio: one job, which reading never changes."""

    def __init__(self, job: Job, call: Callable[[Callable[[], Any]], Awaitable[Any]]) -> None:
        self.id = job.id
        self._job = job
        self._call = call

    def __repr__(self) -> str:
        return f"AsyncJob({self.id!r})"

    @property
    def state(self) -> Awaitable[JobState]:
        """`await job.state`: the state now, read from Redis each time."""
        return self._call(lambda: self._job.state)

    @property
    def progress(self) -> Awaitable[Progress]:
        """`await job.progress`: how far it is, read from Redis each time."""
        return self._call(lambda: self._job.progress)

    @overload
    def events(
        self, timeout: float | None = None, after: str | None = None
    ) -> AsyncIterator[JobEvent | EventsMissing]: ...

    @overload
    def events(
        self, timeout: float | None = None, after: str | None = None, *, heartbeat_seconds: float
    ) -> AsyncIterator[JobEvent | EventsMissing | Heartbeat]: ...

    def events(
        self, timeout: float | None = None, after: str | None = None, heartbeat_seconds: float | None = None
    ) -> AsyncIterator[JobEvent | EventsMissing | Heartbeat]:
        """See `Job.events`."""
        return taken_async(self._job.follow_events(timeout, after, heartbeat_seconds))

    async def result(self, timeout: float | None = None) -> JobResult:
        """See `Job.result`."""
        ((_, end),) = [found async for found in taken_async(self._job.follow_end(timeout))]
        return result_of(end)

    async def cancel(self) -> Cancellation:
        """See `Job.cancel`."""
        cancellation: Cancellation = await self._call(self._job.cancel)
        return cancellation


class AsyncBatch:
    """`Batch` for asyncio."""

    def __init__(self, batch: Batch, call: Callable[[Callable[[], Any]], Awaitable[Any]]) -> None:
        self._batch = batch
        self._call = call

    @property
    def progress(self) -> BatchProgress:
        """See `Batch.progress`."""
        return self._batch.progress

    @property
    def errors_path(self) -> Path:
        """See `Batch.errors_path`."""
        return self._batch.errors_path

    async def wait(self, timeout: float | None = None) -> BatchProgress:
        """See `Batch.wait`."""
        return await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(self._batch.done)), timeout)

    async def stop(self) -> None:
        """See `Batch.stop`."""
        await self._call(self._batch.stop)
