"""The server's clock was set back: what lies in a future of its own comes when it would have come, nothing else moves.

Here it stays, and what it said before lies ahead of it; `tests/chaos/test_stepped_clocks.py` sets it.
"""

import time

import pytest
from redis import Redis

from keye.config import keys
from keye.config.job import Priority
from keye.config.topology import UNACKED_MUTEX
from keye.worker.leases import server_clock
from keye.worker.leases.job_lease import LeaseStore
from keye.worker.leases.server_clock import rebase
from tests.support.leased_jobs import a_failure, a_job, claim, publish, record

STEP = 600.0


@pytest.fixture(params=[1, 500])
def batch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_clock, "REBASED_AT_ONCE", request.param)


def step_back(redis: Redis) -> None:
    """As if the clock had been `STEP` further when all of it was written."""
    for name in (keys.LEASES, keys.TAKEN, *map(keys.queued, Priority), *map(keys.unheard, Priority)):
        for member in redis.zrange(name, 0, -1):
            redis.zincrby(name, STEP, member)
    for name in redis.scan_iter(keys.record("*"), _type="hash"):
        if (due_at := redis.hget(name, "due_at")) is not None:
            redis.hset(name, "due_at", f"{float(due_at) + STEP:.6f}")


def seconds_left(redis: Redis, job_id: str) -> float:
    ends_at = redis.zscore(keys.LEASES, job_id)
    assert ends_at is not None
    return ends_at - time.time()


@pytest.mark.usefixtures("batch")
def test_leases_and_pauses_count_from_now_each_by_its_own_length(store: LeaseStore, redis: Redis) -> None:
    ours, paused, long = (a_job() for _ in range(3))
    claim(store, ours)
    lease = claim(store, paused)
    store.retry(lease, a_failure(lease), 100, None)
    claim(LeaseStore(store.redis, lease_seconds=300), long)
    of_0_2 = claim(store, a_job())
    redis.hdel(keys.record(of_0_2.job_id), "lease_seconds")
    redis.zadd(keys.LEASES, {"sent by hand": time.time() + 20})
    redis.set(keys.record("a string"), "somebody else's")
    redis.zadd(keys.LEASES, {"a string": time.time() + 20})
    step_back(redis)
    for _ in range(3):
        rebase(redis, 30)

    assert seconds_left(redis, ours.job_id) == pytest.approx(30, abs=3)
    assert seconds_left(redis, of_0_2.job_id) == pytest.approx(30, abs=3)
    assert seconds_left(redis, long.job_id) == pytest.approx(300, abs=3)
    assert seconds_left(redis, paused.job_id) == pytest.approx(100, abs=3)
    assert seconds_left(redis, "sent by hand") == pytest.approx(60, abs=3)
    assert seconds_left(redis, "a string") == pytest.approx(60, abs=3)
    assert float(record(redis, paused.job_id)["due_at"]) == redis.zscore(keys.LEASES, paused.job_id)


@pytest.mark.usefixtures("batch")
def test_the_queue_keeps_its_order_and_takes_nobody_for_lost(store: LeaseStore, redis: Redis) -> None:
    old, taken, *waiting = (a_job() for _ in range(6))
    publish(redis, old, time.time() - 2 * STEP)
    for place, sealed in enumerate([taken, *waiting]):
        publish(redis, sealed, time.time() - 200 + place)
    redis.zadd(keys.unheard("normal"), {"cancelled": time.time() - 200 + 1.5})
    claim(store, taken)
    redis.set(UNACKED_MUTEX, "who died with it", px=int(STEP * 1000))
    step_back(redis)
    rebase(redis, 30)
    late = a_job()
    publish(redis, late)

    order = [old, *waiting, late]
    assert redis.zrange(keys.queued("normal"), 0, -1) == [sealed.job_id for sealed in order]
    before, cancelled, after = (
        redis.zscore(keys.queued("normal"), waiting[0].job_id),
        redis.zscore(keys.unheard("normal"), "cancelled"),
        redis.zscore(keys.queued("normal"), waiting[1].job_id),
    )
    assert before < cancelled < after
    assert not redis.exists(UNACKED_MUTEX)
    assert store.sweep(10, [old.job_id]) == ([old.job_id], []), "which was published before one that was taken"
    assert redis.zscore(keys.TAKEN, "normal") == pytest.approx(time.time(), abs=3)
    claim(store, waiting[0])
    assert redis.zrange(keys.queued("normal"), 0, 0) == [waiting[1].job_id]
    assert redis.zscore(keys.TAKEN, "normal") < redis.zscore(keys.queued("normal"), waiting[1].job_id)


def test_what_is_where_it_can_be_stays(store: LeaseStore, redis: Redis) -> None:
    running, first_due, waiting = (a_job() for _ in range(3))
    claim(store, running)
    eta = {**first_due.record, "due_at": f"{time.time() + 5000:.6f}"}
    redis.hset(keys.record(first_due.job_id), mapping=eta)
    redis.zadd(keys.LEASES, {first_due.job_id: eta["due_at"]})
    publish(redis, waiting)
    redis.zadd(keys.DEADLINES, {waiting.job_id: time.time() + 5000})
    names = [keys.LEASES, keys.TAKEN, keys.DEADLINES, *map(keys.queued, Priority)]
    before = [redis.zrange(name, 0, -1, withscores=True) for name in names]
    rebase(redis, 30)
    assert [redis.zrange(name, 0, -1, withscores=True) for name in names] == before


def test_a_turn_that_would_last_for_ten_minutes_is_nobodys(store: LeaseStore, redis: Redis) -> None:
    redis.set(keys.REAPER_TURN, "who died before the clock was set back", px=int(STEP * 1000))
    assert store.take_turn("ours", 1.6)[0]
    assert redis.pttl(keys.REAPER_TURN) <= 1600
    assert not store.take_turn("another", 1.6)[0]


def test_nothing_is_overdue_by_a_clock_that_was_set_since_it_was_read(store: LeaseStore, redis: Redis) -> None:
    held, dead = claim(store, a_job()), claim(store, a_job())
    now = time.time()
    redis.zadd(keys.LEASES, {held.job_id: now - 10, dead.job_id: now - 200})
    latest = now - 120
    assert store.due(keys.LEASES, 10, latest) == [dead.job_id]
    assert store.reap(held.job_id, "reaper", latest) is None
    assert store.reap(dead.job_id, "reaper", latest) is not None
    assert store.reap(held.job_id, "reaper") is not None
