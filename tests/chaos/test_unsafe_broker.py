"""Somebody sets the server otherwise while workers run, so that it may drop or lose jobs: they say so, and go on."""

import pytest

from keye.producer import Client
from keye.worker.daemon.broker_watch import BrokerWatch
from keye.worker.telemetry import metrics
from tests.chaos.broker import Broker
from tests.chaos.conftest import Gate
from tests.chaos.echo_workers import EchoWorkers
from tests.support.conditions import eventually


@pytest.mark.holds(
    "docs/operations.md#what-must-be-true-of-redis",
    "Workers look again all the time",
    "What would have stopped them at their start is an error in the log then",
    "They go on: what waits in the queue",
)
@pytest.mark.holds("docs/alerts.md#keyeunsafebroker", "`keye status` says how")
def test_an_eviction_policy_that_changes_is_told_within_a_lease_by_every_worker_and_so_is_its_cure(
    broker: Broker, client: Client, workers: EchoWorkers, lease_seconds: float, gate: Gate
) -> None:
    workers.start_ready(2)

    def warned() -> list[str]:
        return [line.strip() for line in client.status().lines() if "maxmemory-policy is allkeys-lru" in line]

    assert warned() == []
    for _ in range(2):
        broker.redis.config_set("maxmemory-policy", "allkeys-lru")
        eventually(lambda: len(warned()) == 2, within_seconds=lease_seconds)
        assert "Set it to noeviction" in warned()[0]
        assert client.submit(prompt="hello").result(timeout=30).answer == "hello"
        broker.redis.config_set("maxmemory-policy", "noeviction")
        eventually(lambda: not warned(), within_seconds=lease_seconds)
    bound = f"{lease_seconds:g} s"
    gate("an eviction policy that changes is told, and its cure, within", bound, bound)
    for worker in workers.started:
        told = [line for line in worker.log.splitlines() if "broker eviction" in line]
        assert ["ERROR" in line for line in told] == [True, False, True, False], "once for each change"
        assert "right again" in told[1]


@pytest.mark.parametrize(
    ("option", "unsafe", "safe", "subject", "is_durable"),
    [
        ("maxmemory-policy", "volatile-ttl", "noeviction", "broker eviction", False),
        ("appendonly", "no", "yes", "broker persistence", True),
    ],
)
def test_prometheus_hears_of_it_too(
    broker: Broker, option: str, unsafe: str, safe: str, subject: str, is_durable: bool
) -> None:
    warned: list[tuple[str, ...]] = []
    watch = BrokerWatch(broker.redis, 30, is_durable, warned.append)

    def is_unsafe() -> float:
        watch.turn()
        (sample,) = (s for m in metrics.UNSAFE_BROKER.collect() for s in m.samples if s.labels["subject"] == subject)
        return sample.value

    assert (is_unsafe(), warned) == (0, [])
    broker.redis.config_set(option, unsafe)
    assert is_unsafe() == is_unsafe() == 1
    assert len(warned) == 1
    assert subject in warned[0][0]
    broker.redis.config_set(option, safe)
    assert is_unsafe() == 0
    assert warned[1:] == [()]
