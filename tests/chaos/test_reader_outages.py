"""Those who wait in one process, while their server is killed, frozen, or replaced by one that knows nothing."""

import os
import signal
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import pytest
from redis import Redis

from keye.producer import Client, JobEnded, JobNotEnded, JobNotFound, QueueUnavailable, TextGenerated
from tests.chaos.broker import Broker
from tests.support.conditions import eventually
from tests.support.sides import RedisWorker
from tests.support.worker_side import JOB


@pytest.fixture
def client(broker: Broker) -> Iterator[Client]:
    with Client(f"{broker.url}?socket_timeout=0.5") as client:
        yield client


def blocked(redis: Redis) -> Any:
    return redis.info("clients")["blocked_clients"]


def is_away(client: Client) -> bool:
    return client._transport.reader._fault is not None


def test_a_killed_server_that_comes_back_costs_nobody_a_word(
    broker: Broker, client: Client, meanwhile: Callable[..., Any]
) -> None:
    worker = RedisWorker(broker.redis)
    jobs = client.submit_many([JOB] * 8)
    watch = client.watch(after="0", timeout=120)
    waiting = [meanwhile(job.result, 120) for job in jobs]
    reading = [meanwhile(list, job.events(120)) for job in jobs]
    watching = meanwhile(lambda: {each.job_id for each in islice(watch, len(jobs))})
    for round_number in range(3):
        for job in jobs:
            worker.write(job, f"{round_number} ")
        eventually(lambda: blocked(broker.redis))
        broker.kill()
        eventually(lambda: is_away(client))
        with pytest.raises(QueueUnavailable):
            jobs[0].result(timeout=0)
        broker.start_again()
    for job in jobs:
        worker.answer(job)
    assert [each.result(60).answer for each in waiting] == ["0 1 2 "] * 8
    for each in reading:
        events = each.result(60)
        assert "".join(event.text for event in events if isinstance(event, TextGenerated)) == "0 1 2 "
        assert isinstance(events[-1], JobEnded)
    assert watching.result(60) == {job.id for job in jobs}


def test_a_server_that_has_lost_all_leaves_nobody_waiting(
    broker: Broker, client: Client, meanwhile: Callable[..., Any]
) -> None:
    RedisWorker(broker.redis).answer(client.submit(JOB), "yes")
    jobs = client.submit_many([JOB] * 4)
    (told,) = client.watch(after="0", timeout=0)
    watch = client.watch(after=told.id, timeout=120)
    watching = meanwhile(next, watch)
    waiting = [meanwhile(job.result) for job in jobs] + [meanwhile(list, job.events()) for job in jobs]
    results = meanwhile(lambda: list(client.results(jobs)))
    eventually(lambda: blocked(broker.redis))
    broker.kill()
    for file in sorted(broker._folder.rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    broker.start_again()
    for each in waiting:
        with pytest.raises(JobNotFound):
            each.result(60)
    assert [type(end) for _, end in results.result(60)] == [JobNotFound] * 4
    job = client.submit(JOB)
    job.cancel()
    assert watching.result(60).job_id == job.id


@pytest.mark.parametrize("is_long", [False, True], ids=["briefly", "for long"])
def test_a_frozen_server_that_thaws_costs_nobody_a_word(
    broker: Broker, client: Client, meanwhile: Callable[..., Any], is_long: bool
) -> None:
    worker = RedisWorker(broker.redis)
    jobs = client.submit_many([JOB] * 4)
    waiting = [meanwhile(job.result, 120) for job in jobs[:2]] + [meanwhile(list, job.events(120)) for job in jobs[2:]]
    eventually(lambda: blocked(broker.redis))
    pid = broker.redis.info("server")["process_id"]
    os.kill(pid, signal.SIGSTOP)
    try:
        late = [meanwhile(job.result, 120) for job in jobs]
        impatient = meanwhile(jobs[0].result, 0)
        if is_long:
            with pytest.raises(QueueUnavailable):
                impatient.result(60)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert isinstance(impatient.exception(60), JobNotEnded | QueueUnavailable)
    for job in jobs:
        worker.answer(job, "yes")
    assert [each.result(60).answer for each in waiting[:2] + late] == ["yes"] * 6
    assert all(isinstance(each.result(60)[-1], JobEnded) for each in waiting[2:])


def test_a_server_that_stays_away_is_told_to_all_who_wait_each_after_his_time(
    broker: Broker, client: Client, meanwhile: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("keye.producer.reader.OUTAGE_SECONDS", 1)
    jobs = client.submit_many([JOB] * 4)
    waiting = [meanwhile(job.result) for job in jobs] + [meanwhile(list, job.events()) for job in jobs]
    waiting += [meanwhile(list, client.watch())]
    results = meanwhile(lambda: list(client.results([*jobs, "nobody else"])))
    eventually(lambda: blocked(broker.redis))
    broker.kill()
    for each in waiting:
        with pytest.raises(QueueUnavailable):
            each.result(60)
    ends = results.result(60)
    # Of one that was never there it may have been told before.
    assert {type(end) for job, end in ends if job.id != "nobody else"} == {QueueUnavailable}
    assert len(ends) == 5
    broker.start_again()
    assert jobs[0].cancel() == "cancelled"
