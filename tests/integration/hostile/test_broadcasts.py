"""Whoever may only PUBLISH to remote control ends no worker, changes none, and has it write to no other list."""

import time
import uuid

import pytest
from celery import Celery

from keye.config.codes import ErrorCode, JobState
from tests.integration.hostile.broadcasts import BROADCASTS, CHANGES
from tests.integration.hostile.echo_host import EchoHost
from tests.integration.hostile.messages import SECRET, SIGNED, command, message, sealed_job
from tests.support.conditions import eventually

MAX_GROWTH_BYTES = 100 * 10**6


@pytest.mark.parametrize("kind", BROADCASTS)
def test_no_broadcast_ends_a_worker_or_leads_it_elsewhere(host: EchoHost, kind: str) -> None:
    before = host.peak_bytes()
    host.broadcast(BROADCASTS[kind])
    host.ping()
    host.answer_another()
    assert host.foreign_keys() == []
    assert host.peak_bytes() - before < MAX_GROWTH_BYTES


@pytest.mark.parametrize("method", CHANGES)
def test_no_broadcast_changes_a_worker(host: EchoHost, method: str) -> None:
    host.broadcast(command(method, arguments=CHANGES[method]))
    host.ping()
    began = time.monotonic()
    host.answer_another()
    assert time.monotonic() - began < 30
    with Celery(broker=host.url, set_as_current=False) as app:
        (queues,) = eventually(lambda: app.control.inspect(limit=1, timeout=30).active_queues()).values()
        (stats,) = eventually(lambda: app.control.inspect(limit=1, timeout=30).stats()).values()
    assert [queue["name"] for queue in queues] == ["keye.jobs"]
    assert stats["pool"]["max-concurrency"] == 192


def test_a_broadcast_cancels_a_job_by_its_id(host: EchoHost) -> None:
    running = host.client.submit(prompt="wait 60")
    eventually(lambda: running.state is JobState.RUNNING)
    host.broadcast(command("revoke", arguments={"task_id": running.id, "terminate": True}))
    assert host.failure(running.id).code is ErrorCode.CANCELLED
    host.answer_another()


def test_who_looks_at_a_worker_does_not_see_what_is_asked(host: EchoHost) -> None:
    job = host.client.submit(prompt="wait 60", metadata={"source": SIGNED})
    by_hand = f"looked-at-{uuid.uuid4()}"
    host.send(message(by_hand, sealed=sealed_job(by_hand, prompt="wait 60")))
    eventually(lambda: job.state is JobState.RUNNING and host.job(by_hand).state is JobState.RUNNING)
    with Celery(broker=host.url, set_as_current=False) as app:
        inspect = app.control.inspect(limit=1, timeout=30)
        for look in (inspect.active, inspect.reserved, inspect.scheduled, inspect.stats, inspect.conf, inspect.report):
            told = str(eventually(look))
            assert SECRET not in told
            assert "wait 60" not in told
        assert job.id in str(inspect.active())
        assert job.id in str(inspect.query_task(job.id))
    for each in (job, host.job(by_hand)):
        each.cancel()
    host.answer_another()


def test_many_at_once_cost_nobody_anything(host: EchoHost) -> None:
    for raw in BROADCASTS.values():
        if len(raw) < 10**5:
            host.broadcast(raw)
    host.ping()
    host.answer_another()
    assert host.foreign_keys() == []
