"""What those who wait cost their process: readers of events, waiters for results, outcomes in bulk, and the import."""

import asyncio
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from redis import Redis

from benchmarks.machine import peak_bytes
from keye.config import keys
from keye.config.event import TextGenerated
from keye.producer import AsyncClient, AsyncJob, Client, Job
from keye.worker.demo.embedded_valkey import EmbeddedValkey
from tests.support.worker_side import JOB, answer, settle

ROUNDS = 3
NUM_TASKS, NUM_THREADS, NUM_OUTCOMES = 2000, 1000, 10_000
NUM_ECHOES = 200


def run() -> str:
    rows = ["| | |", "|---|---|"]
    with EmbeddedValkey() as broker:
        for kind, what in (
            ("tasks", f"{NUM_TASKS} tasks that read events and {NUM_TASKS} that wait for results, one `AsyncClient`"),
            ("threads", f"{NUM_THREADS} threads that wait for results, one `Client`"),
        ):
            memory, connections, seconds = (statistics.median(each) for each in _rounds(kind, broker.url))
            rows += [f"| {what}: memory of the process, connections | {memory:.0f} MiB, {connections:.0f} |"]
            rows += [f"| the same: from the last job's end until all have heard theirs | {seconds:.2f} s |"]
        alone, among, bulk, ratio = (statistics.median(each) for each in _rounds("latency", broker.url))
        heard = f"an event, written until read, by one reader / by one beside {NUM_TASKS} jobs that are silent"
        rows += [f"| {heard} | {alone:.2f} / {among:.2f} ms |"]
        rows += [f"| `results` of {NUM_OUTCOMES} ended jobs | {bulk:.0f} a second, {ratio:.1f} x `result` of each |"]
    for module in ("import keye", "from keye import AsyncClient"):
        rows += [f"| `{module}` | {statistics.median(_seconds_to(module) for _ in range(5)):.2f} s |"]
    return "\n".join(["## Who waits\n", f"Medians of {ROUNDS} processes each.\n", *rows, ""])


def _rounds(kind: str, url: str) -> list[tuple[float, ...]]:
    """The measures of each round, by measure."""
    command = [sys.executable, "-m", "benchmarks.waiting", kind, url]
    lines = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(ROUNDS)]
    return list(zip(*map(json.loads, lines), strict=True))


def _seconds_to(statement: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - began


def _tasks(url: str, redis: Redis) -> list[float]:
    async def read(job: AsyncJob) -> None:
        async for _ in job.events():
            pass

    async def measure() -> list[float]:
        async with AsyncClient(url) as client:
            jobs = [job for job in await client.submit_many([JOB] * NUM_TASKS) if isinstance(job, AsyncJob)]
            reading = [asyncio.create_task(read(job)) for job in jobs]
            waiting = [asyncio.create_task(job.result()) for job in jobs]
            await asyncio.sleep(2)
            connections = redis.info("clients")["connected_clients"]
            await asyncio.to_thread(_write, redis, [job.id for job in jobs], 10)
            ended_at = await asyncio.to_thread(_end, redis, jobs)
            await asyncio.gather(*reading, *waiting)
            return [peak_bytes() / 2**20, connections, time.perf_counter() - ended_at]

    return asyncio.run(measure())


def _threads(url: str, redis: Redis) -> list[float]:
    with Client(url) as client, ThreadPoolExecutor(NUM_THREADS) as threads:
        jobs = [job for job in client.submit_many([JOB] * NUM_THREADS) if isinstance(job, Job)]
        waiting = [threads.submit(job.result) for job in jobs]
        time.sleep(2)
        connections = redis.info("clients")["connected_clients"]
        ended_at = _end(redis, jobs)
        for each in waiting:
            each.result()
        return [peak_bytes() / 2**20, connections, time.perf_counter() - ended_at]


def _latency(url: str, redis: Redis) -> list[float]:
    with Client(url) as client:
        alone = _echo(client, redis)
        silent = [job for job in client.submit_many([JOB] * NUM_TASKS) if isinstance(job, Job)]
        following = threading.Thread(target=lambda: list(client.results(silent)))
        following.start()
        time.sleep(2)
        among = _echo(client, redis)
        _end(redis, silent)
        following.join()
        jobs = [job for job in client.submit_many([JOB] * NUM_OUTCOMES) if isinstance(job, Job)]
        _end(redis, jobs)
        bulk = _seconds(lambda: list(client.results(jobs)))
        each = _seconds(lambda: [job.result() for job in jobs[: NUM_OUTCOMES // 10]])
        return [1000 * alone, 1000 * among, NUM_OUTCOMES / bulk, 10 * each / bulk]


def _echo(client: Client, redis: Redis) -> float:
    """Seconds from an event's writing until a reader who waits for it has it."""
    job = client.submit(JOB)
    events, seconds = job.events(), []
    for _ in range(NUM_ECHOES):
        writing = threading.Timer(0.005, _write, (redis, [job.id], 1))
        writing.start()
        event = next(events)
        seconds.append(time.time() - event.at)
        writing.join()
    _end(redis, [job])
    list(events)
    return statistics.median(seconds)


def _write(redis: Redis, job_ids: list[str], number: int) -> None:
    for index in range(number):
        with redis.pipeline(transaction=False) as writing:
            for job_id in job_ids:
                text = TextGenerated(
                    channel="answer", text="some words ", offset=0, num_tokens=index, attempt=1, at=time.time()
                )
                writing.xadd(keys.events(job_id), {"event": text.model_dump_json()})
            writing.execute()


def _end(redis: Redis, jobs: list[Job] | list[AsyncJob]) -> float:
    """When the last has ended."""
    for job in jobs:
        settle(redis, job, answer(job))
    return time.perf_counter()


def _seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


if __name__ == "__main__":
    _, kind, url = sys.argv
    with Redis.from_url(url, decode_responses=True, socket_timeout=60) as redis:
        print(json.dumps({"tasks": _tasks, "threads": _threads, "latency": _latency}[kind](url, redis)))
