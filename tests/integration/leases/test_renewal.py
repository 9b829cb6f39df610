"""Leases that are kept while their jobs run, and what their holders are told."""

import pytest
from redis import Redis
from redis.exceptions import RedisError

from keye.config import keys
from keye.worker.leases.job_lease import LeaseStore, Renewal
from keye.worker.leases.renewal import LeaseRenewal
from keye.worker.telemetry import metrics
from tests.support.conditions import eventually
from tests.support.leased_jobs import a_job, claim


@pytest.mark.holds("docs/design.md#decisions", "renews the lease while it works")
def test_renewal_keeps_what_is_held_and_lets_go_of_the_rest(brief: LeaseStore, redis: Redis) -> None:
    renewal = LeaseRenewal(brief)
    renewal.start()
    held, left = claim(brief, a_job()), claim(brief, a_job())
    with renewal.holding(held, lambda reason: None):
        eventually(lambda: brief.due(keys.LEASES, 10) == [left.job_id])
    eventually(lambda: len(brief.due(keys.LEASES, 10)) == 2)
    renewal.stop()


def test_holder_is_told_once_that_its_lease_is_lost(brief: LeaseStore, redis: Redis) -> None:
    renewal = LeaseRenewal(brief)
    told: list[Renewal] = []
    lease = claim(brief, a_job())
    with renewal.holding(lease, told.append):
        redis.hset(keys.record(lease.job_id), "token", "another's")
        renewal.turn()
        renewal.turn()
    assert told == ["lost"]


def test_holder_is_told_that_the_caller_cancels_and_keeps_the_lease(brief: LeaseStore, redis: Redis) -> None:
    renewal = LeaseRenewal(brief)
    told: list[Renewal] = []
    lease = claim(brief, a_job())
    with renewal.holding(lease, told.append):
        redis.hset(keys.record(lease.job_id), "cancel_requested", "1")
        eventually(lambda: brief.due(keys.LEASES, 10))
        renewal.turn()
        assert told == ["cancelled"]
        assert brief.due(keys.LEASES, 10) == []


def test_a_cancel_that_is_heard_between_claim_and_holding_is_told_at_once(client: Redis, redis: Redis) -> None:
    patient = LeaseStore(client, 900)
    renewal = LeaseRenewal(patient)
    renewal.start()
    told: list[Renewal] = []
    lease = claim(patient, a_job())
    redis.hset(keys.record(lease.job_id), "cancel_requested", "1")
    renewal.hurry(lease.job_id)
    with renewal.holding(lease, told.append):
        eventually(lambda: told == ["cancelled"])
    renewal.stop()


@pytest.mark.holds("docs/alerts.md#keyelaterenewals", "Workers renew their leases so late")
def test_a_renewal_is_late_once_it_has_come(brief: LeaseStore, redis: Redis) -> None:
    renewal = LeaseRenewal(brief)

    def num_late() -> float:
        return metrics.LATE_RENEWALS.collect()[0].samples[0].value

    before = num_late()
    with renewal.holding(claim(brief, a_job()), lambda reason: None):
        eventually(lambda: brief.due(keys.LEASES, 10))
        redis.rename(keys.LEASES, "away")
        redis.set(keys.LEASES, "no leases")
        for _ in range(3):
            with pytest.raises(RedisError):
                renewal.turn()
        assert num_late() == before
        redis.rename("away", keys.LEASES)
        renewal.turn()
        renewal.turn()
        assert num_late() == before + 1
