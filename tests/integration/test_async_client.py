"""The asynchronous client among tasks that are cancelled, loops that end, and a server that is mute."""

import asyncio
import gc
import io
import multiprocessing
import os
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image
from redis import Redis

from keye.producer import AsyncClient, AsyncJob, Client, Heartbeat, JobEnded, JobNotEnded, QueueUnavailable
from tests.support.conditions import eventually
from tests.support.worker_side import JOB, answer, settle, start


async def drain(items: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in items]


async def endless() -> None:
    await asyncio.Event().wait()


# All at which a task may be waiting.
WAITS: dict[str, Callable[[AsyncClient, AsyncJob], Awaitable[Any]]] = {
    "result": lambda client, job: job.result(),
    "result with a timeout": lambda client, job: job.result(60),
    "events": lambda client, job: drain(job.events()),
    "events with heartbeats": lambda client, job: drain(job.events(heartbeat_seconds=0.01)),
    "results": lambda client, job: drain(client.results([job, job.id])),
    "watch": lambda client, job: drain(client.watch()),
    "map": lambda client, job: drain(client.map("?", ["s3://photos/1.jpg"])),
}


def followings(client: AsyncClient) -> set[Any]:
    """Those whom the reader still reads for."""
    return {each for each in client._client._transport.reader._followings if not each.is_closed}


@pytest.fixture
def complaints(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What loops and interpreters say of tasks and generators that were left alone; none is expected."""
    heard: list[Any] = []
    monkeypatch.setattr(asyncio.BaseEventLoop, "default_exception_handler", lambda loop, context: heard.append(context))
    monkeypatch.setattr("sys.unraisablehook", heard.append)
    yield heard
    gc.collect()
    assert heard == []


@pytest.mark.usefixtures("complaints")
class TestLeaving:
    @pytest.mark.parametrize("wait", WAITS)
    def test_a_cancelled_task_leaves_nothing_behind(self, redis_url: str, redis: Redis, wait: str) -> None:
        async def main() -> None:
            async with AsyncClient(redis_url) as client:
                job = await client.submit(JOB)
                tasks = [asyncio.create_task(WAITS[wait](client, job)) for _ in range(5)]
                while len(followings(client)) < 5:
                    await asyncio.sleep(0.01)
                for task in tasks:
                    task.cancel()
                ends = await asyncio.gather(*tasks, return_exceptions=True)
                assert [type(end) for end in ends] == [asyncio.CancelledError] * 5
                await asyncio.sleep(0)
                assert followings(client) == set()
                assert await job.state == "QUEUED"

        asyncio.run(main())

    @pytest.mark.holds("docs/producers.md#from-asyncio", "To stop waiting, cancel the task, or leave")
    @pytest.mark.parametrize("wait", WAITS)
    def test_a_timeout_around_it_is_a_timeout(self, redis_url: str, redis: Redis, wait: str) -> None:
        async def main() -> None:
            async with AsyncClient(redis_url) as client:
                job = await client.submit(JOB)
                with pytest.raises(TimeoutError) as told:
                    async with asyncio.timeout(0.2):
                        await WAITS[wait](client, job)
                assert not isinstance(told.value, JobNotEnded)

        asyncio.run(main())

    @pytest.mark.parametrize("wait", WAITS)
    def test_a_loop_may_end_under_those_who_wait(self, redis_url: str, redis: Redis, wait: str) -> None:
        client = AsyncClient(redis_url)

        async def main() -> None:
            job = await client.submit(JOB)
            task = asyncio.create_task(WAITS[wait](client, job))
            while not followings(client):
                await asyncio.sleep(0.01)
            # Neither awaited nor cancelled.
            assert not task.done()

        for _ in range(3):
            asyncio.run(main())
            assert followings(client) == set()
        asyncio.run(client.close())

    def test_who_breaks_off_or_never_begins_is_not_read_for(self, redis_url: str, redis: Redis) -> None:
        async def main() -> None:
            async with AsyncClient(redis_url) as client:
                job = await client.submit(JOB)
                start(redis, job)  # type: ignore[arg-type]
                async for event in job.events():
                    assert event.type == "stage"
                    break
                async for beat in job.events(heartbeat_seconds=0.01, after=event.id):
                    assert isinstance(beat, Heartbeat)
                    break
                job.events()
                client.watch()
                await asyncio.sleep(0)
                await asyncio.sleep(0)
                assert followings(client) == set()

        asyncio.run(main())

    def test_two_loops_share_a_client(self, redis_url: str, redis: Redis) -> None:
        client = AsyncClient(redis_url)

        async def main() -> list[str]:
            jobs = await client.submit_many([JOB] * 20)
            waiting = [asyncio.create_task(job.result(60)) for job in jobs]
            await asyncio.sleep(0)
            for job in jobs:
                await asyncio.to_thread(settle, redis, job, answer(job, job.id))
            assert [result.answer for result in await asyncio.gather(*waiting)] == [job.id for job in jobs]
            return [job.id for job in jobs]

        with ThreadPoolExecutor(2) as threads:
            loops = [threads.submit(asyncio.run, main()) for _ in range(2)]
            assert len({job_id for loop in loops for job_id in loop.result(60)}) == 40
        asyncio.run(client.close())

    def test_a_closed_client_is_told_to_who_waits_and_begins_anew(self, redis_url: str, redis: Redis) -> None:
        async def main() -> None:
            client = AsyncClient(redis_url)
            job = await client.submit(JOB)
            waiting = [asyncio.create_task(wait(client, job)) for wait in (WAITS["result"], WAITS["events"])]
            while len(followings(client)) < 2:
                await asyncio.sleep(0.01)
            await client.close()
            ends = await asyncio.gather(*waiting, return_exceptions=True)
            assert [type(end) for end in ends] == [QueueUnavailable] * 2
            settle(redis, job, answer(job))  # type: ignore[arg-type]
            assert (await job.result(10)).answer == "a red square"
            await client.close()

        asyncio.run(main())


class Ticks:
    """How often the loop came round while something else was done."""

    async def __aenter__(self) -> "Ticks":
        self.number = 0
        self._task = asyncio.create_task(self._tick())
        return self

    async def __aexit__(self, *error: object) -> None:
        self._task.cancel()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(0.001)
            self.number += 1


class TestTheLoopGoesOn:
    def test_while_redis_is_mute(self, redis_url: str, redis: Redis) -> None:
        async def main() -> None:
            async with AsyncClient(redis_url) as client:
                job = await client.submit(JOB)
                waiting = [asyncio.create_task(wait(client, job)) for wait in WAITS.values()]
                while len(followings(client)) < len(WAITS):
                    await asyncio.sleep(0.01)
                os.kill(pid, signal.SIGSTOP)
                try:
                    waiting += [asyncio.create_task(wait(client, job)) for wait in WAITS.values()]
                    waiting += [asyncio.create_task(client.submit(JOB)), asyncio.ensure_future(job.state)]
                    async with Ticks() as ticks:
                        await asyncio.sleep(3)
                    assert ticks.number > 100
                finally:
                    os.kill(pid, signal.SIGCONT)
                await waiting[-1]
                await waiting[-2]
                for task in waiting:
                    task.cancel()
                await asyncio.gather(*waiting, return_exceptions=True)

        pid = redis.info("server")["process_id"]
        asyncio.run(main())

    @pytest.mark.holds("docs/producers.md#from-asyncio", "Nothing blocks the event loop")
    @pytest.mark.parametrize("what", ["a large picture", "five thousand jobs", "media that are slow to come by"])
    def test_while_jobs_are_made(self, redis_url: str, redis: Redis, what: str) -> None:
        picture = Image.fromarray(np.random.default_rng(1).integers(0, 255, (560, 560, 3), np.uint8))

        def slowly() -> Iterator[io.BytesIO | Image.Image]:
            for _ in range(3):
                # Blocks whoever goes through it, until the loop has come round.
                eventually(lambda before=ticks.number: ticks.number > before + 20)
                yield picture

        async def main() -> None:
            nonlocal ticks
            async with AsyncClient(redis_url) as client, Ticks() as ticks:
                match what:
                    case "a large picture":
                        await asyncio.gather(*[client.submit(prompt="?", media=[picture] * 9) for _ in range(8)])
                    case "five thousand jobs":
                        await client.submit_many([{"prompt": "?"}] * 5_000)
                    case _:
                        mapping = asyncio.create_task(drain(client.map("?", slowly())))
                        while not followings(client):
                            await asyncio.sleep(0.01)
                        mapping.cancel()
                assert ticks.number > 20

        ticks = Ticks()
        asyncio.run(main())


def _submits(client: AsyncClient, ends: Any) -> None:
    async def main() -> str:
        job = await client.submit(JOB)
        await job.cancel()
        events = await drain(job.events(30))
        assert isinstance(events[-1], JobEnded)
        return job.id

    ends.put(asyncio.run(main()))


def test_a_forked_child_has_threads_of_its_own(redis_url: str, redis: Redis) -> None:
    async def main() -> None:
        job = await client.submit(JOB)
        await job.state

    client = AsyncClient(redis_url)
    asyncio.run(main())
    assert threading.active_count() > 1
    context = multiprocessing.get_context("fork")
    ends = context.SimpleQueue()
    child = context.Process(target=_submits, args=(client, ends))
    child.start()
    child.join(60)
    is_stuck = child.is_alive()
    child.kill()
    assert not is_stuck
    with Client(redis_url) as other:
        assert other.find(ends.get()).state == "CANCELLED"
    asyncio.run(client.close())
