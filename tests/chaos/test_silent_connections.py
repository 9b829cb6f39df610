"""Half-open connections: a firewall forgot them, nobody hung up, and no byte arrives any more."""

import time
from collections.abc import Callable

import pytest

from keye.config import keys
from keye.config.codes import JobState
from keye.producer import Client, Job
from tests.chaos.broker import Broker
from tests.chaos.conftest import Gate
from tests.chaos.echo_workers import EchoWorkers
from tests.chaos.ledger import attempts_of, wait_for_all
from tests.support.conditions import eventually
from tests.support.scale import LONG
from tests.support.silent_proxy import SilentProxy

DEAF_SECONDS = 15.0


# The lease that is usual: silence is noticed by timeouts of 5 s, which a short one would not outlive.
@pytest.mark.holds(
    "docs/reliability.md#the-chaos-tests",
    "connections that fall silent and",
)
@pytest.mark.holds(
    "docs/reliability.md#promises",
    "A silent connection is noticed",
)
@pytest.mark.parametrize("lease_seconds", [LONG.lease_seconds])
def test_silent_connections_are_noticed_and_jobs_go_on_where_they_are(
    broker: Broker,
    client: Client,
    workers: EchoWorkers,
    assert_all_is_well: Callable[[list[Job]], None],
    gate: Gate,
) -> None:
    with SilentProxy(broker.port) as proxy:
        worker = workers.start(url=f"redis://127.0.0.1:{proxy.port}/0")
        worker.wait_until_ready()
        running = [client.submit(prompt="wait 12") for _ in range(4)]
        worker.wait_until_holding(4)

        assert proxy.fall_silent() >= 4
        silent_since = time.monotonic()
        # What the server had begun to hand out is lost on the way; that is another test's.
        eventually(lambda: not broker.redis.info("clients")["blocked_clients"], within_seconds=5)
        after = client.submit(prompt="wait 0.1")
        eventually(lambda: after.state is not JobState.QUEUED, within_seconds=DEAF_SECONDS)
        gate(
            "half-open connections: the next job is taken after",
            f"{time.monotonic() - silent_since:.1f} s",
            f"{DEAF_SECONDS:g} s, 0 lost, 0 extra starts",
        )
        assert time.monotonic() - silent_since < DEAF_SECONDS
        assert proxy.num_swallowed_bytes > 0
        wait_for_all(broker.redis, [*running, after], within_seconds=30)

        assert attempts_of(broker.redis, running) == [1] * 4
        assert {broker.redis.hget(keys.record(job.id), "worker") for job in running} == {worker.name}
        assert_all_is_well([*running, after])
        worker.kill()
