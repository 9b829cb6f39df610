"""Callers who wait for their results while everything fails at once: each hears how its job ended, in time."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from keye.config.codes import ErrorCode
from keye.config.faults import JobFailed
from keye.producer import Client, Job
from keye.producer.transport import Transport
from tests.chaos.broker import Broker
from tests.chaos.conftest import Gate
from tests.chaos.echo_workers import EchoWorkers
from tests.chaos.ledger import assert_nothing_is_left
from tests.support.scale import SCALE

AFTER_DEADLINE_SECONDS = 60.0


@pytest.mark.holds(
    "docs/reliability.md#the-chaos-tests",
    "10 callers waiting through a",
)
def test_every_waiting_caller_hears_how_its_job_ended(
    broker: Broker, client: Client, workers: EchoWorkers, gate: Gate
) -> None:
    def wait_for(job: Job) -> tuple[str, float]:
        """The end as the caller hears it, and when."""
        try:
            end = job.result(timeout=SCALE.deadline_seconds + AFTER_DEADLINE_SECONDS).answer
        except JobFailed as failed:
            end = failed.code
        return end, time.monotonic() - began

    def submit(prompt: str) -> Job:
        return client.submit(prompt=prompt, deadline_seconds=SCALE.deadline_seconds)

    (victim,) = workers.start_ready(KEYE_CONCURRENCY="8")
    began = time.monotonic()
    succeeding, overrunning, cancelled = submit("wait 1.5"), [submit("wait 600") for _ in range(6)], submit("wait 600")
    victim.wait_until_holding(8)
    too_late, withdrawn = submit("wait 600"), submit("wait 600")
    jobs = [succeeding, *overrunning, cancelled, too_late, withdrawn]
    with ThreadPoolExecutor(len(jobs)) as callers:
        ends = [callers.submit(wait_for, job) for job in jobs]
        withdrawn.cancel()
        assert len(victim.kill()) == 8
        (heir,) = workers.start_ready(KEYE_CONCURRENCY="8")
        heir.wait_until_holding(8, within_seconds=SCALE.restart_seconds)
        cancelled.cancel()
        broker.kill()
        time.sleep(SCALE.lease_seconds / 3)
        broker.start_again()
        heard = [end.result() for end in ends]
    expected = ["wait 1.5"] + 6 * [ErrorCode.DEADLINE_EXCEEDED]
    expected += [ErrorCode.CANCELLED, ErrorCode.DEADLINE_EXCEEDED, ErrorCode.CANCELLED]
    last = max(seconds for _, seconds in heard)
    gate(
        f"{len(jobs)} callers waiting through kill, outage, cancel and expiry: the last hears of its end",
        f"{last - SCALE.deadline_seconds:.1f} s after the deadline",
        f"{AFTER_DEADLINE_SECONDS:g} s",
    )
    assert [end for end, _ in heard] == expected
    assert last < SCALE.deadline_seconds + AFTER_DEADLINE_SECONDS
    assert_nothing_is_left(client, broker.redis, SCALE.lease_seconds)


def test_a_result_is_read_though_redis_goes_away_just_behind_the_end(
    broker: Broker, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = client.submit(prompt="hello")
    job.cancel()
    look = Transport.look
    back = threading.Timer(1, broker.start_again)

    def go_away(*arguments: Any) -> Any:
        monkeypatch.undo()
        broker.kill()
        back.start()
        return look(*arguments)

    # The outcome is read with the record.
    monkeypatch.setattr(Transport, "look", go_away)
    with pytest.raises(JobFailed, match=ErrorCode.CANCELLED):
        job.result(timeout=30)
    back.join()
