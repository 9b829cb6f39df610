"""SIGTERM while jobs run that take longer than the drain may."""

import signal
import time

from config import keys
from producer import Client
from tests.acceptance.conftest import eventually
from tests.chaos.conftest import Broker, Workers, assert_nothing_is_left, wait_for_all
from worker.daemon.exit_codes import ExitCode

DRAIN_SECONDS = 2.0


def test_jobs_that_outlast_the_drain_are_given_back_and_the_attempt_does_not_count(
    broker: Broker, client: Client, workers: Workers
) -> None:
    leaving = workers.start(drain_seconds=DRAIN_SECONDS)
    leaving.wait_until_ready()
    short = [client.submit(prompt="wait 1", max_attempts=1) for _ in range(2)]
    long = [client.submit(prompt="wait 600", max_attempts=1) for _ in range(6)]
    eventually(lambda: len(leaving.held_jobs()) == 8, within_seconds=10)
    heir = workers.start()
    heir.wait_until_ready()

    leaving.process.send_signal(signal.SIGTERM)
    told_at = time.monotonic()
    assert leaving.process.wait(DRAIN_SECONDS + 5) == ExitCode.OK
    took = time.monotonic() - told_at
    eventually(lambda: len(heir.held_jobs()) == 6, within_seconds=2)
    print(f"exit {took:.1f} s after SIGTERM, given back jobs run {time.monotonic() - told_at - took:.1f} s later")

    assert DRAIN_SECONDS <= took < DRAIN_SECONDS + 2
    assert [job.result(timeout=1).worker.pid for job in short] == [leaving.process.pid] * 2
    assert broker.redis.hlen("unacked") == 6
    for job in long:
        assert not any(field.startswith("attempt:") for field in broker.redis.hkeys(keys.record(job.id)))
        job.cancel()
    wait_for_all(broker, long, within_seconds=10)
    assert_nothing_is_left(broker, client)
