"""docs/stream-to-a-browser.md: what one process' streams take, and what FastAPI writes by itself."""

import asyncio

import pytest
from fastapi import sse
from redis import Redis

from keye.producer import AsyncClient, AsyncJob, TextGenerated
from tests.support.conditions import eventually
from tests.support.sides import RedisWorker

NUM_STREAMS = 50


@pytest.mark.holds("docs/producers.md#from-asyncio", "One client serves all tasks.")
@pytest.mark.holds(
    "docs/stream-to-a-browser.md#how-do-i-stream-an-answer-to-a-browser",
    "one connection to Redis serves all readers of a process, and nothing blocks its loop",
)
def test_all_streams_of_a_process_share_a_connection_and_the_loop_goes_on(redis: Redis, redis_url: str) -> None:
    worker = RedisWorker(redis)

    def readers() -> list[str]:
        return [each["id"] for each in redis.client_list() if "b" in each["flags"]]

    async def play() -> tuple[list[str], int, float]:
        async with AsyncClient(redis_url) as client:
            jobs = [await client.submit(prompt="?") for _ in range(NUM_STREAMS)]

            async def read(job: AsyncJob) -> str:
                return "".join([e.text async for e in job.events() if isinstance(e, TextGenerated)])

            async with asyncio.TaskGroup() as group:
                reading = [group.create_task(read(job)) for job in jobs]
                longest, loop = 0.0, asyncio.get_running_loop()
                for _ in range(100):
                    before = loop.time()
                    await asyncio.sleep(0.01)
                    longest = max(longest, loop.time() - before)
                num_readers = len(await asyncio.to_thread(eventually, readers))
                await asyncio.to_thread(lambda: [[worker.write(job, "yes"), worker.answer(job)] for job in jobs])
            return [task.result() for task in reading], num_readers, longest

    texts, num_readers, longest = asyncio.run(play())
    assert texts == ["yes"] * NUM_STREAMS
    assert num_readers == 1
    assert longest < 1


@pytest.mark.holds(
    "docs/stream-to-a-browser.md#what-does-the-backend-do", "FastAPI writes a comment into a silent stream every 15 s"
)
def test_fastapi_breaks_the_silence_by_itself() -> None:
    assert sse._PING_INTERVAL == 15
    assert sse.KEEPALIVE_COMMENT.startswith(b":")
