"""Jobs that end by what no job should raise, or that would never end: each is a failure, and its slot is free again."""

import pytest

from keye.config import keys
from keye.config.codes import ErrorCode
from keye.config.faults import JobFailed
from keye.producer import Client
from tests.chaos.broker import Broker
from tests.chaos.conftest import Gate
from tests.chaos.echo_workers import EchoWorkers
from tests.chaos.ledger import assert_nothing_is_left, wait_for_all
from tests.support.scale import SCALE

ODD = ["SystemExit", "MemoryError", "KeyboardInterrupt"]
LIMIT_SECONDS = 1.0


@pytest.mark.holds(
    "docs/reliability.md#the-chaos-tests",
    "SystemExit, MemoryError, KeyboardInterrupt; jobs that",
)
def test_a_job_that_ends_oddly_is_a_failure_and_its_slot_runs_the_next(
    broker: Broker, client: Client, workers: EchoWorkers, gate: Gate
) -> None:
    (worker,) = workers.start_ready()
    longest = 0.0
    # More often than there are slots: were they lost, the last would wait for ever.
    for name in ODD * 3:
        job = client.submit(prompt=f"raise {name}")
        with pytest.raises(JobFailed) as failed:
            job.result(timeout=5)
        claimed_at, ended_at = broker.redis.hmget(keys.record(job.id), "claimed_at", "ended_at")
        longest = max(longest, float(ended_at) - float(claimed_at))
        assert failed.value.code is ErrorCode.INTERNAL
    gate(", ".join(ODD), f"outcome after {longest:.2f} s", "1 s, slot free")
    assert longest < 1

    endless = [client.submit(prompt="wait 600", deadline_seconds=LIMIT_SECONDS) for _ in range(8)]
    over_after = wait_for_all(broker.redis, endless, within_seconds=LIMIT_SECONDS + 5)
    gate(f"endless jobs, limit {LIMIT_SECONDS:g} s", f"ended after {over_after:.1f} s", "limit + 5 s, slots free")
    for job in endless:
        with pytest.raises(JobFailed) as failed:
            job.result(timeout=1)
        assert failed.value.code is ErrorCode.DEADLINE_EXCEEDED

    next_ones = [client.submit(prompt="wait 2") for _ in range(8)]
    worker.wait_until_holding(8)
    wait_for_all(broker.redis, next_ones, within_seconds=30)
    assert worker.process.is_alive()
    assert_nothing_is_left(client, broker.redis, SCALE.lease_seconds)
