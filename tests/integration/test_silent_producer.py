"""A producer whose connections have fallen silent: nobody hung up, and nothing comes through any more."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from redis import Redis

from keye.config import connection
from keye.config.codes import ErrorCode, JobState
from keye.producer import Client, JobFailed, QueueUnavailable
from tests.support.conditions import eventually
from tests.support.silent_proxy import SilentProxy

NOTICED_SECONDS = 15.0


def test_a_server_that_never_says_a_word_is_given_up_after_four_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "SOCKET_TIMEOUT_SECONDS", 0.2)
    with (
        socket.create_server(("127.0.0.1", 0)) as mute,
        Client(f"redis://127.0.0.1:{mute.getsockname()[1]}/0") as client,
    ):
        with pytest.raises(QueueUnavailable):
            client.submit(prompt="?")
        mute.setblocking(False)
        num_calls = 0
        with suppress(BlockingIOError):
            while True:
                mute.accept()[0].close()
                num_calls += 1
    assert num_calls == 4


def test_waiting_and_submitting_go_on_over_new_connections(redis: Redis, redis_url: str) -> None:
    port = redis.connection_pool.connection_kwargs["port"]
    with (
        SilentProxy(port) as proxy,
        Client(f"redis://127.0.0.1:{proxy.port}/0") as client,
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
