"""SIGTERM while jobs run that take longer than the drain may."""

import time

import pytest

from keye.config import keys
from keye.producer import Client
from keye.worker.daemon.exit_codes import ExitCode
from tests.chaos.broker import Broker
from tests.chaos.conftest import Gate
from tests.chaos.echo_workers import EchoWorkers
from tests.chaos.ledger import assert_nothing_is_left, wait_for_all
from tests.support.scale import SCALE


@pytest.mark.holds(
    "docs/reliability.md#the-chaos-tests",
    "SIGTERM with 2 jobs of",
)
@pytest.mark.holds(
    "docs/reliability.md#promises",
    "SIGTERM takes the drain's time,",
    "Jobs that outlast `KEYE_DRAIN_SECONDS` go",
)
@pytest.mark.holds(
    "docs/operations.md#how-do-i-stop-or-restart-a-worker-without-losing-jobs",
    "they start again next, and the attempt does not count",
)
def test_jobs_that_outlast_the_drain_run_next_elsewhere_and_the_attempt_does_not_count(
    broker: Broker, client: Client, workers: EchoWorkers, gate: Gate
) -> None:
    leaving = workers.start(drain_seconds=SCALE.drain_seconds, KEYE_CONCURRENCY="8")
    leaving.wait_until_ready()
    short = [client.submit(prompt="wait 2", max_attempts=1) for _ in range(2)]
    long = [client.submit(prompt="wait 600", max_attempts=1) for _ in range(6)]
    leaving.wait_until_holding(8)
    backlog = [client.submit(prompt="wait 600") for _ in range(4)]

    leaving.terminate()
    told_at = time.monotonic()
    assert leaving.exit_code(SCALE.drain_seconds + 5) == ExitCode.OK
    took = time.monotonic() - told_at
    (heir,) = workers.start_ready(KEYE_CONCURRENCY="8")
    heir.wait_until_holding(8)
    assert {job.id for job in long} < set(heir.held_jobs()), "before those that were queued already"

    gate(
        f"SIGTERM with 6 jobs of 600 s, drain {SCALE.drain_seconds:g} s: exit after",
        f"{took:.1f} s",
        f"{SCALE.drain_seconds + 2:g} s, all back",
    )
    assert SCALE.drain_seconds <= took < SCALE.drain_seconds + 2
    assert [job.result(timeout=1).worker.pid for job in short] == [leaving.pid] * 2
    for job in long:
        assert not any(field.startswith("attempt:") for field in broker.redis.hkeys(keys.record(job.id)))
    for job in long + backlog:
        job.cancel()
    wait_for_all(broker.redis, long + backlog, within_seconds=10)
    assert_nothing_is_left(client, broker.redis, SCALE.lease_seconds)
