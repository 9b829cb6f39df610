"""What must be true of the broker. It is a real Valkey."""

import time
from collections.abc import Iterator

import pytest
from redis import Redis

from keye.config.redis_url import RedisUrl
from keye.worker.daemon.findings import Finding, Severity, select
from keye.worker.daemon.preflight import check_broker, check_password, check_skew, measure_skew


def check(url: str, require_durable: bool = False) -> list[Finding]:
    return list(check_broker(url, lease_seconds=30, require_durable=require_durable))


@pytest.fixture
def evicting_url(redis: Redis, redis_url: str) -> Iterator[str]:
    redis.config_set("maxmemory-policy", "allkeys-lru")
    yield redis_url
    redis.config_set("maxmemory-policy", "noeviction")


@pytest.fixture
def forgetful_url(redis: Redis, redis_url: str) -> Iterator[str]:
    redis.config_set("appendonly", "no")
    yield redis_url
    redis.config_set("appendonly", "yes")


@pytest.mark.holds(
    "docs/scaling.md#how-many-gpus-that-is",
    "`maxmemory-policy noeviction`, which a worker checks when it starts, and while it runs",
)
@pytest.mark.holds("docs/operations.md#what-must-be-true-of-redis", "`keye-worker run` refuses to start otherwise")
def test_a_broker_that_may_evict_jobs_is_refused(evicting_url: str) -> None:
    (fault,) = select(check(evicting_url), Severity.FAULT)
    assert "allkeys-lru" in str(fault)
    assert "noeviction" in fault.cure


@pytest.mark.holds("docs/operations.md#what-must-be-true-of-redis", "(`KEYE_REQUIRE_DURABLE=1` makes this a fault)")
def test_a_broker_without_an_append_only_file_is_warned_about_or_refused(forgetful_url: str) -> None:
    (warning,) = select(check(forgetful_url), Severity.WARNING)
    assert "appendonly" in warning.cure
    (fault,) = select(check(forgetful_url, require_durable=True), Severity.FAULT)
    assert "KEYE_REQUIRE_DURABLE" in str(fault)


@pytest.mark.holds(
    "docs/operations.md#what-must-be-true-of-redis",
    "a password or ACLs unless it listens on loopback only: both are warnings",
)
@pytest.mark.parametrize(
    ("url", "severity"),
    [
        ("redis://queue.internal:6379/0", Severity.WARNING),
        ("redis://:secret@queue.internal:6379/0", Severity.OK),
        ("redis://localhost/0", Severity.OK),
        ("redis://127.0.1.1/0", Severity.OK),
        ("unix:///run/redis.sock", Severity.OK),
    ],
)
def test_only_an_open_broker_on_the_network_is_warned_about(url: str, severity: Severity) -> None:
    assert check_password(RedisUrl.read(url)).severity is severity


def test_a_broker_that_cannot_be_used_is_a_fault_that_never_shows_the_password() -> None:
    (finding,) = check("redis://:hunter2@127.0.0.1:1/0")
    assert finding.severity is Severity.FAULT
    assert "hunter2" not in str(finding)


@pytest.mark.holds(
    "docs/operations.md#what-must-be-true-of-redis",
    "Its clock and the worker's at most a third of `KEYE_LEASE_SECONDS` apart",
)
@pytest.mark.parametrize(
    ("skew", "lease", "severity"),
    [
        (1.9, 30, Severity.OK),
        (-2.1, 30, Severity.WARNING),
        (9.9, 30, Severity.WARNING),
        (-10.1, 30, Severity.FAULT),
        (1.1, 3, Severity.FAULT),
    ],
)
def test_clocks_that_differ_are_warned_about_and_refused_beyond_a_third_of_the_lease(
    skew: float, lease: float, severity: Severity
) -> None:
    finding = check_skew(skew, lease)
    assert finding.severity is severity
    assert f"{abs(skew)} s {'ahead of' if skew > 0 else 'behind'}" in finding.found


def test_a_clock_that_is_wrong_is_measured_against_the_server(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    assert abs(measure_skew(redis)) < 1
    ours = time.time
    monkeypatch.setattr("time.time", lambda: ours() - 60)
    assert 59 < measure_skew(redis) < 61
