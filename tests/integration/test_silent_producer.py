"""A producer whose connections have fallen silent: nobody hung up, and nothing comes through any more."""

import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from redis import Redis

from keye.config.codes import ErrorCode, JobState
from keye.config.connection import SOCKET_TIMEOUT_SECONDS
from keye.producer import Client, JobFailed, QueueUnavailable
from tests.support.conditions import eventually
from tests.support.redis_login import at_port
from tests.support.silent_proxy import SilentProxy
from tests.support.worker_side import JOB

NOTICED_SECONDS = 15.0


@pytest.mark.holds("docs/producers.md#what-can-be-raised", "one that never answers is given up within 22 s")
def test_a_server_that_never_answers_is_given_up(meanwhile: Callable[..., Any]) -> None:
    timeout, pauses = 0.5, 3 * 0.5
    assert 4 * SOCKET_TIMEOUT_SECONDS + pauses < 22
    asks = [
        lambda client: client.submit(JOB),
        lambda client: client.submit_many([JOB])[0].result(),
        lambda client: client.job("7").progress,
        lambda client: client.job("7").cancel(),
        lambda client: client.status(),
    ]
    with socket.create_server(("127.0.0.1", 0), backlog=64) as mute:
        url = f"redis://127.0.0.1:{mute.getsockname()[1]}/0?socket_timeout={timeout}&socket_connect_timeout={timeout}"

        def ask(what: Callable[[Client], Any]) -> float:
            began_at = time.monotonic()
            with Client(url) as client, pytest.raises(QueueUnavailable):
                what(client)
            return time.monotonic() - began_at

        waits = [meanwhile(ask, what) for what in asks]
        assert max(each.result(60) for each in waits) < 4 * timeout + pauses + 1


@pytest.mark.holds(
    "docs/reliability.md#promises",
    "A silent connection is noticed",
)
def test_waiting_and_submitting_go_on_over_new_connections(redis: Redis, redis_url: str) -> None:
    port = redis.connection_pool.connection_kwargs["port"]
    with (
        SilentProxy(port) as proxy,
        Client(at_port(redis_url, proxy.port)) as client,
        Client(redis_url) as other,
        ThreadPoolExecutor() as threads,
    ):
        waited_for = client.submit(prompt="?")
        waiting = threads.submit(waited_for.result, timeout=60)
        eventually(lambda: redis.info("clients")["blocked_clients"], within_seconds=5)
        assert proxy.fall_silent() >= 1
        silent_since = time.monotonic()
        other.find(waited_for.id).cancel()
        submitting = threads.submit(client.submit, prompt="?")

        with pytest.raises(JobFailed) as told:
            waiting.result(NOTICED_SECONDS)
        assert told.value.code is ErrorCode.CANCELLED
        assert submitting.result(silent_since + NOTICED_SECONDS - time.monotonic()).state is JobState.QUEUED
