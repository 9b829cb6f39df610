"""All clients, in threads and in asyncio, on a real server and in memory, each with who works for it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from pydantic import SecretStr
from typer.testing import CliRunner

from keye.producer import AsyncClient, Client, Settings
from keye.testing import MemoryClient
from tests.support.sides import RedisWorker, synchronously

MAX_QUEUE_DEPTH = 8


@pytest.fixture
def keye(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    """The command, for the server of the test."""
    monkeypatch.setenv("KEYE_REDIS_URL", redis_url)
    return CliRunner()


@dataclass
class Pair:
    """A client, and who works for it."""

    client: Any
    worker: Any


@pytest.fixture(params=["threads", "asyncio", "memory", "asyncio in memory"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    if "memory" in request.param:
        memory = MemoryClient(max_queue_depth=MAX_QUEUE_DEPTH)
        worker, make = memory, lambda: memory
    else:
        redis, url = request.getfixturevalue("redis"), request.getfixturevalue("redis_url")
        settings = Settings(redis_url=SecretStr(url), max_queue_depth=MAX_QUEUE_DEPTH)
        worker, make = RedisWorker(redis), lambda: Client(settings)
    if "asyncio" in request.param:
        for client in synchronously(lambda: AsyncClient(make())):
            yield Pair(client, worker)
    else:
        with make() as client:
            yield Pair(client, worker)
