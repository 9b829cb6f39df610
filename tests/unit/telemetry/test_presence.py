"""A worker process is seen by others exactly while it is there."""

import logging
import time

import pytest
from redis import Redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from config import keys
from config.outcome import ModelIdentity, WorkerIdentity
from worker.telemetry.presence import EXPIRY_SECONDS, Announcer, Presence, WorkerState, list_present, read_presence

LOADING = Presence(worker=WorkerIdentity(host="box", pid=7, device="cpu"), state=WorkerState.LOADING)
READY = LOADING.model_copy(
    update={
        "state": WorkerState.READY,
        "model": ModelIdentity(name="small", model_type="Keye", precision="float32"),
    }
)


def wait_for(redis: Redis, expected: list[Presence]) -> None:
    end = time.monotonic() + 5
    while (present := list_present(redis)) != expected:
        assert time.monotonic() < end, present
        time.sleep(0.01)


def test_each_change_is_seen_at_once_and_the_end_too(redis: Redis) -> None:
    announcer = Announcer(redis, LOADING)
    announcer.start()
    wait_for(redis, [LOADING])
    announcer.announce(READY)
    wait_for(redis, [READY])
    assert read_presence(redis, "box", 7) == READY
    announcer.stop()
    assert list_present(redis) == []


def test_a_process_that_falls_silent_is_forgotten(redis: Redis) -> None:
    announcer = Announcer(redis, READY)
    announcer.start()
    wait_for(redis, [READY])
    assert 0 < redis.ttl(keys.worker("box", 7)) <= EXPIRY_SECONDS
    announcer.stop()


def test_a_redis_that_is_away_does_not_stop_the_announcer(caplog: pytest.LogCaptureFixture) -> None:
    announcer = Announcer(Redis(host="127.0.0.1", port=1, retry=Retry(NoBackoff(), 0)), READY)
    with caplog.at_level(logging.WARNING, logger="worker.telemetry.presence"):
        announcer.start()
        announcer.stop()
    assert "Connection refused" in caplog.text
