"""The server dies under queued and running jobs and comes back with its append-only file, or is full for a while."""

import time

import pytest
from redis.exceptions import OutOfMemoryError

from config import keys
from producer import Client
from tests.acceptance.conftest import eventually
from tests.chaos.conftest import (
    Broker,
    Workers,
    assert_each_succeeded_once,
    assert_nothing_is_left,
    count_ended,
    wait_for_all,
)

DOWN_SECONDS = 5.0


def test_a_killed_broker_loses_and_doubles_nothing(broker: Broker, client: Client, workers: Workers) -> None:
    worker = workers.start()
    worker.wait_until_ready()
    # Two end while the server is away, four after; beside them the short ones go on until the very moment.
    long = [client.submit(prompt=f"wait {seconds}") for seconds in (5, 5, 12, 12, 12, 12)]
    eventually(lambda: len(worker.held_jobs()) == len(long), within_seconds=10)
    short = [client.submit(prompt="wait 0.03") for _ in range(500)]
    # An everysec server may lose the last second that it said yes to.
    time.sleep(1.5)

    broker.kill()
    time.sleep(DOWN_SECONDS)
    broker.start_again()
    back_at = time.monotonic()
    num_ended = count_ended(broker, short)
    assert num_ended < 450
    eventually(lambda: count_ended(broker, short) > num_ended, within_seconds=35)
    print(f"{num_ended} of 500 had ended; the next did {time.monotonic() - back_at:.1f} s after the server was back")
    wait_for_all(broker, long + short, within_seconds=60)

    assert sum(f"settling job {job.id}: Redis is away" in worker.log for job in long) == 2
    # Four leases long, and nobody but the server died.
    assert {broker.redis.hget(keys.record(job.id), "attempts") for job in long} == {"1"}
    assert_each_succeeded_once(broker, long + short)
    assert_nothing_is_left(broker, client)


def test_a_full_broker_loses_and_doubles_nothing(broker: Broker, client: Client, workers: Workers) -> None:
    worker = workers.start()
    worker.wait_until_ready()
    jobs = [client.submit(prompt="wait 1") for _ in range(24)]
    eventually(lambda: len(worker.held_jobs()) == 8, within_seconds=10)

    broker.redis.config_set("maxmemory", "1mb")
    with pytest.raises(OutOfMemoryError):
        broker.redis.set("something", "more")
    time.sleep(DOWN_SECONDS)
    num_ended = count_ended(broker, jobs)
    broker.redis.config_set("maxmemory", 0)
    back_at = time.monotonic()
    eventually(lambda: count_ended(broker, jobs) > num_ended, within_seconds=35)
    print(f"the next job ended {time.monotonic() - back_at:.1f} s after there was room")
    wait_for_all(broker, jobs, within_seconds=60)

    assert worker.process.poll() is None
    assert num_ended < len(jobs)
    assert_each_succeeded_once(broker, jobs)
    assert_nothing_is_left(broker, client)
