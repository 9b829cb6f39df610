"""What must be true of Redis or Valkey before a worker starts, and of how Celery uses it. Changes nothing there."""

import time
from collections.abc import Iterator, Mapping
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from kombu.serialization import prepare_accept_content
from redis import Redis, RedisError

from keye.config.connection import HOW_TO_WRITE_URL, connect
from keye.worker.broker.transport import SCHEME
from keye.worker.daemon.findings import Finding, Severity, fault, ok, warning

# Leases go by the server's clock, deadlines by the producer's, logs by the host's.
WARN_SKEW_SECONDS = 2.0
CLOCK_READINGS = 3


def check_broker(url: str, lease_seconds: float, require_durable: bool) -> Iterator[Finding]:
    """Reachable, never evicts, keeps what it was told, knows what time it is, asks who is there."""
    address = urlsplit(url)
    try:
        shown = f"{address.hostname or address.path}:{address.port or 6379}"
        connection = connect(url, retries=0)
    except ValueError:
        yield fault("broker", "KEYE_REDIS_URL cannot be read", HOW_TO_WRITE_URL)
        return
    try:
        with connection as redis:
            facts = redis.info()
            skew = measure_skew(redis)
    except RedisError as error:
        yield fault("broker", f"{shown} cannot be used: {error}", "Start it, or correct KEYE_REDIS_URL.")
        return
    server = f"{facts.get('server_name', 'redis')} {facts.get('valkey_version', facts['redis_version'])}"
    yield ok("broker", f"{server} at {shown}")

    policy = facts.get("maxmemory_policy", "unknown")
    if policy == "noeviction":
        yield ok("broker eviction", policy)
    else:
        cure = "Set it to noeviction: any other drops waiting jobs or results when memory is full."
        yield fault("broker eviction", f"maxmemory-policy is {policy}", cure)

    if facts.get("aof_enabled"):
        yield ok("broker persistence", "append-only file")
    else:
        cure = "Set appendonly yes: without it a crash of the broker loses accepted jobs."
        severity = Severity.FAULT if require_durable else Severity.WARNING
        found = "there is no append-only file" + ", and KEYE_REQUIRE_DURABLE is set" * require_durable
        yield Finding("broker persistence", severity, found, cure)

    yield check_skew(skew, lease_seconds)
    yield check_password(url)


def measure_skew(redis: Redis) -> float:
    """By how many seconds the server's clock is ahead of ours, as the quickest of a few answers has it."""
    readings = []
    for _ in range(CLOCK_READINGS):
        asked_at = time.time()
        seconds, microseconds = redis.time()
        answered_at = time.time()
        readings.append((answered_at - asked_at, seconds + microseconds / 1e6 - (asked_at + answered_at) / 2))
    return min(readings)[1]


def check_skew(skew_seconds: float, lease_seconds: float) -> Finding:
    """`skew_seconds` as `measure_skew` has it."""
    found = f"the broker's is {abs(skew_seconds):.1f} s {'ahead of' if skew_seconds > 0 else 'behind'} this host's"
    cure = "Set both by NTP (timedatectl, chronyc tracking)."
    if abs(skew_seconds) > lease_seconds / 3:
        found += f", more than a third of the lease of {lease_seconds:g} s (KEYE_LEASE_SECONDS)"
        return fault("clock", found, cure)
    if abs(skew_seconds) > WARN_SKEW_SECONDS:
        return warning("clock", found, cure)
    return ok("clock", found)


def check_password(url: str) -> Finding:
    address = urlsplit(url)
    if address.password:
        return ok("broker password", "set")
    if address.scheme == "unix" or _is_loopback(address.hostname or "localhost"):
        return ok("broker password", "none, but only this host gets in")
    cure = "Set requirepass or ACLs: who reaches an open broker can run and read every job."
    return warning("broker password", f"{address.hostname} is used without a password", cure)


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


PICKLE = "application/x-python-serialize"
# Celery takes these over an app's own options.
OVERRIDES = ("CELERY_BROKER_URL", "CELERY_BROKER_READ_URL", "CELERY_BROKER_WRITE_URL", "CELERY_RESULT_BACKEND")


def check_celery(conf: Mapping[str, Any], environ: Mapping[str, str]) -> Iterator[Finding]:
    """`conf` is the app's."""
    faults = [
        fault("Celery", f"{option} takes pickle", "Leave it at json: a pickle runs what it likes.")
        for option in ("accept_content", "result_accept_content")
        if PICKLE in (prepare_accept_content(conf[option]) or ())
    ]
    for name in OVERRIDES:
        if environ.get(name):
            cure = "Unset it: jobs would wait in one server and be looked for in another."
            faults.append(fault("Celery", f"{name} takes the place of KEYE_REDIS_URL", cure))
    yield from faults or [ok("Celery", "reads json only, from KEYE_REDIS_URL")]


def check_transport(conf: Mapping[str, Any]) -> Iterator[Finding]:
    """Whether messages are read before Celery reads them."""
    if conf["broker_transport"] != SCHEME:
        found = f"broker_transport is {conf['broker_transport']!r}"
        yield fault("Celery", found, f"Leave it at {SCHEME}: by any other, one malformed message ends every worker.")
