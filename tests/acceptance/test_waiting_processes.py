"""Processes in which somebody waits: they fork, end, are told to stop, and leave clients lying about."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from redis import Redis

from tests.support.checkout import PYTHONPATH, ROOT

ENVIRONMENT = os.environ | {"PYTHONPATH": PYTHONPATH}
# What each program begins with; it prints what a test asserts.
BEGIN = """
import gc, multiprocessing, os, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from redis import Redis
from keye import AsyncClient, Client, JobNotEnded, JobNotFound, QueueUnavailable
from keye.producer import reader
from tests.support.conditions import eventually
from tests.support.worker_side import JOB, answer, settle

url = sys.argv[1]
redis = Redis.from_url(url, decode_responses=True, socket_timeout=60)

def connections():
    return redis.info("clients")["connected_clients"]

def daemon(target, *args):
    thread = threading.Thread(target=target, args=args, daemon=True)
    thread.start()
    return thread

def use(client):
    "All that a client does, at once and from threads."
    def once(number):
        job = client.submit(JOB)
        assert job.state == "QUEUED"
        early = [threads.submit(job.result, 60), threads.submit(list, job.events(60))]
        settle(redis, job, answer(job, job.id))
        assert early[0].result(60).answer == job.result(60).answer == job.id
        assert early[1].result(60)[-1].type == "ended"
        ((same, end),) = client.results([job], timeout=60)
        assert end.answer == job.id
    with ThreadPoolExecutor(32) as threads:
        list(threads.map(once, range(8)))
"""
FORKED_WHILE_MANY_WAIT = """
client = Client(url)
jobs = client.submit_many([JOB] * 50)
with ThreadPoolExecutor(50) as threads:
    waiting = [threads.submit(job.result, 120) for job in jobs]
    eventually(lambda: len(client._transport.reader._followings) == 50)
    if (child := os.fork()) == 0:
        use(client)
        if (grandchild := os.fork()) == 0:
            use(client)
            os._exit(0)
        use(client)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]))
    use(client)
    for job in jobs:
        settle(redis, job, answer(job, job.id))
    assert [each.result(60).answer for each in waiting] == [job.id for job in jobs]
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
print("all heard")
"""
FORKED_MANY_TIMES_AMID_COMING_AND_GOING = """
client = Client(url)
is_over = threading.Event()

def come_and_go():
    job = client.submit(JOB)
    while not is_over.is_set():
        try:
            job.result(timeout=0.001)
        except JobNotEnded:
            pass

with ThreadPoolExecutor(8) as threads:
    coming = [threads.submit(come_and_go) for _ in range(8)]
    for _ in range(20):
        if (child := os.fork()) == 0:
            job = client.submit(JOB)
            job.cancel()
            list(job.events(60))
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    is_over.set()
    for each in coming:
        each.result(60)
print("all heard")
"""
AN_ITERATOR_IN_THE_CHILD = """
client = Client(url)
job = client.submit(JOB)
events, watch = job.events(heartbeat_seconds=0.01), client.watch(after="0")
next(events)
client.submit(JOB).cancel()
next(watch)
if (child := os.fork()) == 0:
    for iterator in (events, watch):
        try:
            for _ in iterator:
                pass
        except QueueUnavailable as told:
            assert "forked" in str(told)
        else:
            os._exit(1)
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
job.cancel()
assert list(events)[-1].type == "ended"
print("all heard")
"""
LEFT_LYING_ABOUT = """
reader.IDLE_SECONDS = 0.2
before = connections()
for _ in range(30):
    client = Client(url)
    job = client.submit(JOB)
    settle(redis, job, answer(job))
    assert job.result(60).answer
    events = job.events()
    next(events)
del client, job, events
eventually(lambda: gc.collect() >= 0 and threading.active_count() == 1)
eventually(lambda: gc.collect() >= 0 and connections() == before)
print("all heard")
"""
ONE_A_REQUEST = """
import resource
before = connections()
def request():
    with Client(url) as client:
        job = client.submit(JOB)
        try:
            job.result(timeout=0)
        except JobNotEnded:
            job.cancel()
        assert list(job.events(60))
for _ in range(300):
    request()
    assert threading.active_count() < 8, threading.enumerate()
    assert connections() - before < 8
gc.collect()
assert threading.active_count() == 1
eventually(lambda: connections() == before)
assert sum(isinstance(each, Client) for each in gc.get_objects()) == 0
print("all heard")
"""
ENDED_WHILE_THEY_WAIT = """
client = Client(url)
jobs = client.submit_many([JOB] * 30)
for job in jobs:
    daemon(job.result)
    daemon(list, job.events(heartbeat_seconds=0.01))
daemon(list, client.watch())
eventually(lambda: len(client._transport.reader._followings) == 61)
print("all heard")
"""
ENDED_BEFORE_THEIR_JOBS = """
client = Client(url)
job = client.submit(JOB)

def wait():
    print("all heard" if job.result(60).answer == "a red square" else "lost")

threading.Thread(target=wait).start()
eventually(lambda: len(client._transport.reader._followings) == 1)
threading.Timer(0.5, settle, (redis, job, answer(job))).start()
"""
TOLD_TO_STOP = """
import signal

# Where tests run in the background of a shell, a process begins deaf to it.
signal.signal(signal.SIGINT, signal.default_int_handler)
client = Client(url)
daemon(client.submit(JOB).result)
eventually(lambda: client._transport.reader._is_reading)
print("all heard", flush=True)
client.submit(JOB).result()
"""
POOLS = """
def work(url, job_id):
    with Client(url) as client:
        return client.job(job_id).result(timeout=0.1)

if __name__ == "__main__":
    client = Client(url)
    job = client.submit(JOB)
    daemon(job.result)
    eventually(lambda: client._transport.reader._is_reading)
    for method in ("fork", "spawn", "forkserver"):
        with multiprocessing.get_context(method).Pool(2) as pool:
            for job_id, error in ((job.id, JobNotEnded), ("nobody", JobNotFound)):
                try:
                    pool.apply(work, (url, job_id))
                except error as told:
                    assert job_id in str(told)
                else:
                    raise AssertionError(method)
    print("all heard")
"""
PROGRAMS = {
    name.lower().replace("_", " "): program
    for name, program in list(globals().items())
    if name.isupper() and isinstance(program, str) and name not in ("BEGIN", "TOLD_TO_STOP", "PYTHONPATH")
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_process_says_that_all_heard_and_nothing_else(
    redis: Redis, redis_url: str, name: str, tmp_path: Path
) -> None:
    program = tmp_path / "program.py"
    program.write_text(BEGIN + PROGRAMS[name])
    command = [sys.executable, "-W", "error", "-W", "ignore:.*fork.*:DeprecationWarning", str(program), redis_url]
    ran = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "all heard\n", "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_is_told_to_stop_does(redis: Redis, redis_url: str, number: signal.Signals) -> None:
    command = [sys.executable, "-c", BEGIN + TOLD_TO_STOP, redis_url]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, **pipes) as process:
        assert process.stdout
        assert process.stdout.readline() == b"all heard\n"
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == -number
    assert b"Fatal" not in said
