"""Stores of leases and the settlement, on the real server."""

from collections.abc import Iterator

import pytest
from redis import Redis

from keye.config.connection import connect
from keye.worker.leases.job_lease import LeaseStore
from keye.worker.results.settlement import Settlement
from tests.support.leased_jobs import BRIEF_LEASE_SECONDS, DEAD_LETTER_TTL, TTL


@pytest.fixture
def client(redis_url: str) -> Iterator[Redis]:
    with connect(redis_url) as client:
        yield client


@pytest.fixture
def store(client: Redis) -> LeaseStore:
    return LeaseStore(client, lease_seconds=30)


@pytest.fixture
def brief(client: Redis) -> LeaseStore:
    """A store whose leases end while a test waits."""
    return LeaseStore(client, BRIEF_LEASE_SECONDS)


@pytest.fixture
def settlement(client: Redis) -> Settlement:
    return Settlement(client, TTL, DEAD_LETTER_TTL)
