"""Crowds that wait in one process, beside others who submit, ask and cancel, before and after a fork."""

import subprocess
import sys

import pytest
from redis import Redis

from keye.producer import Client
from tests.support.checkout import ROOT
from tests.support.worker_side import answer, settle

# Each is a program of its own: its memory, threads and connections are nobody else's. It prints what a test asserts.
BEGIN = """
import asyncio, os, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from redis import Redis
from keye import AsyncClient, Client, JobFailed, TextGenerated
from keye.config import keys
from tests.support.conditions import eventually
from tests.support.worker_side import JOB, answer, settle

url, number = sys.argv[1], int(sys.argv[2])
redis = Redis.from_url(url, decode_responses=True, socket_timeout=60)

def connections():
    return redis.info("clients")["connected_clients"]

def end(jobs):
    for job in jobs:
        settle(redis, job, answer(job, job.id))
"""
THREADS = """
client = Client(url)

def crowd():
    jobs = client.submit_many([JOB] * number)
    before = connections()
    with ThreadPoolExecutor(number) as threads:
        waiting = [threads.submit(job.result, 120) for job in jobs]
        eventually(lambda: threading.active_count() > number)
        for job in jobs[:40]:
            assert client.submit(JOB).state == client.find(job.id).state == "QUEUED"
            job.cancel()
        for job in jobs[40:80]:
            assert job.progress.state == "QUEUED"
        assert connections() - before < 10, connections()
        end(jobs[40:])
        for job, wait in zip(jobs, waiting, strict=True):
            try:
                assert wait.result(120).answer == job.id
            except JobFailed as failed:
                assert failed.code == "CANCELLED" and job in jobs[:40]

crowd()
if (child := os.fork()) == 0:
    crowd()
    os._exit(0)
crowd()
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
TASKS = """
async def read(job, heard):
    texts = [event.text async for event in job.events() if isinstance(event, TextGenerated)]
    heard.append("".join(texts) == "one two three ")

async def main():
    before = connections()
    async with AsyncClient(url) as client:
        jobs = await client.submit_many([JOB] * number)
        heard = []
        reading = [asyncio.create_task(read(job, heard)) for job in jobs]
        waiting = [asyncio.create_task(job.result()) for job in jobs]
        await asyncio.sleep(0)
        assert {await job.state for job in jobs[:20]} == {"QUEUED"}
        assert connections() - before < 20, connections()

        def work():
            for index, text in enumerate(("one ", "two ", "three ")):
                event = TextGenerated(channel="answer", text=text, offset=0, num_tokens=index, attempt=1, at=0)
                with redis.pipeline(transaction=False) as writing:
                    for job in jobs:
                        writing.xadd(keys.events(job.id), {"event": event.model_dump_json()})
                    writing.execute()
            end(jobs)

        await asyncio.to_thread(work)
        ends = await asyncio.gather(*waiting)
        await asyncio.gather(*reading)
        assert [result.answer for result in ends] == [job.id for job in jobs]
        assert heard == [True] * number
        collected = {job.id: result.answer async for job, result in client.results(jobs)}
        assert len(collected) == number

asyncio.run(main())
"""
MEMORY = """
# Not getrusage: it tells what the parent of this process held.
(peak,) = (line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak) // 1024)
"""


def run(program: str, url: str, number: int) -> str:
    command = [sys.executable, "-c", BEGIN + program + MEMORY, url, str(number)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=250, cwd=ROOT)
    assert ran.returncode == 0, f"{ran.stderr[:3000]} ... {ran.stderr[-3000:]}"
    return ran.stdout


@pytest.mark.holds("docs/producers.md#from-python", "All who wait in a process share one connection")
@pytest.mark.holds("docs/design.md#decisions", "Callers take what was found, a thread or a task of asyncio alike")
def test_a_thousand_threads_wait_and_others_submit_ask_and_cancel_beside_them_before_and_after_a_fork(
    redis_url: str,
) -> None:
    run(THREADS, redis_url, 1000)


@pytest.mark.holds(
    "docs/scaling.md#what-a-job-takes",
    "All callers who wait in",
)
@pytest.mark.holds(
    "docs/design.md#decisions",
    "One thread of a process reads the streams of all jobs that somebody in it follows",
)
def test_two_thousand_tasks_read_events_and_two_thousand_wait_over_a_few_connections_and_300_mb(redis_url: str) -> None:
    megabytes = int(run(TASKS, redis_url, 2000))
    assert megabytes < 300


@pytest.mark.holds("docs/producers.md#many-jobs", "What has ended is read by the hundred")
def test_outcomes_by_the_thousand_are_read_in_bulk(client: Client, redis: Redis) -> None:
    jobs = client.submit_many([{"prompt": "?"}] * 10_000)
    for job in jobs:
        settle(redis, job, answer(job))
    before = redis.info("stats")["total_reads_processed"]
    assert {job.id for job, end in client.results(jobs) if end.answer == "a red square"} == {job.id for job in jobs}
    # Far from one round trip for each.
    assert redis.info("stats")["total_reads_processed"] - before < 500
