"""A worker process is seen by others exactly while it is there."""

import logging

import pytest
from redis import Redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from keye.config import keys
from keye.config.outcome import ModelIdentity, WorkerIdentity
from keye.config.presence import EXPIRY_SECONDS, Presence, WorkerState, list_present
from keye.worker.telemetry.presence import Announcer
from tests.support.conditions import eventually

LOADING = Presence(worker=WorkerIdentity(host="box", pid=7, device="cpu"), state=WorkerState.LOADING)
READY = LOADING.model_copy(
    update={
        "state": WorkerState.READY,
        "model": ModelIdentity(name="small", model_type="Keye", precision="float32"),
        "max_tokens": 4096,
    }
)

KEPT = {"result": 600, "dead_letter": 300}


@pytest.mark.holds("docs/operations.md#is-it-up-and-is-it-taking-jobs", "No key: there is no such process")
def test_each_change_is_seen_at_once_and_the_end_too(redis: Redis) -> None:
    announcer = Announcer(redis, LOADING, "keye@box", KEPT)
    announcer.start()
    eventually(lambda: list_present(redis) == [LOADING])
    announcer.announce(READY)
    eventually(lambda: list_present(redis) == [READY])
    assert redis.zrange(keys.NODES, 0, -1) == ["keye@box"]
    announcer.stop()
    assert list_present(redis) == []
    assert not redis.exists(keys.NODES)


@pytest.mark.holds(
    "docs/operations.md#is-it-up-and-is-it-taking-jobs",
    "each worker process keeps a key that expires when it falls silent for 20 seconds",
)
def test_a_process_that_falls_silent_is_forgotten(redis: Redis) -> None:
    announcer = Announcer(redis, READY, "keye@box", KEPT)
    announcer.start()
    eventually(lambda: list_present(redis) == [READY])
    assert 0 < redis.ttl(keys.worker("box", 7)) <= EXPIRY_SECONDS
    announcer.stop()


@pytest.mark.holds("docs/operations.md#is-it-up-and-is-it-taking-jobs", "the next smallest counts")
def test_producers_hear_the_smallest_context_of_the_workers_that_are_there(redis: Redis) -> None:
    def wait_for_context(expected: str | None) -> None:
        eventually(lambda: redis.get(keys.CONTEXT) == expected)

    def announced(max_tokens: int, template_tokens: int = 0) -> Announcer:
        room = {"max_tokens": max_tokens, "template_tokens": template_tokens}
        announcer = Announcer(redis, READY.model_copy(update=room), "keye@box", KEPT)
        announcer.start()
        return announcer

    announcers = [announced(4096)]
    wait_for_context("4096")
    announcers.append(announced(1032, template_tokens=8))
    wait_for_context("1024")
    assert 0 < redis.ttl(keys.CONTEXT) <= EXPIRY_SECONDS
    redis.delete(keys.worker("box", 7))
    announcers[0].announce(READY)
    eventually(lambda: list_present(redis) == [READY])
    wait_for_context("1024")
    redis.delete(keys.CONTEXT)  # as it expires, once the smaller one is gone
    announcers[0].announce(READY)
    wait_for_context("4096")
    for announcer in announcers:
        announcer.stop()


def test_who_died_before_the_servers_clock_was_set_back_is_not_there_for_so_much_longer(redis: Redis) -> None:
    redis.set(keys.worker("box", 8), READY.model_dump_json(), ex=600)
    redis.set(keys.CONTEXT, 512, ex=600)
    announcer = Announcer(redis, READY, "celery@box", KEPT)
    announcer.start()
    eventually(lambda: redis.get(keys.CONTEXT) == "4096")
    eventually(lambda: list_present(redis) == [READY])
    announcer.stop()


def test_a_redis_that_is_away_does_not_stop_the_announcer(caplog: pytest.LogCaptureFixture) -> None:
    announcer = Announcer(Redis(host="127.0.0.1", port=1, retry=Retry(NoBackoff(), 0)), READY, "keye@box", KEPT)
    with caplog.at_level(logging.WARNING, logger="keye.worker.telemetry.presence"):
        announcer.start()
        announcer.stop()
    assert "Connection refused" in caplog.text
