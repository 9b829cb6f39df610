"""Processes die or freeze under their jobs: every job ends once, and soon."""

import time
from collections.abc import Callable
from itertools import chain

import pytest

from keye.config import keys
from keye.config.codes import ErrorCode, JobState
from keye.config.outcome import JobFailure, JobResult
from keye.producer import Client, Job
from tests.chaos.broker import Broker
from tests.chaos.conftest import Gate
from tests.chaos.echo_workers import EchoWorkers
from tests.chaos.ledger import attempts_of, outcome_of, wait_for_all
from tests.support.conditions import eventually
from tests.support.scale import SCALE, SHORT

BACKLOG = 200
# As many as there may be: what is counted is lost jobs, and few are given up.
MAX_ATTEMPTS = 10
PROMPTS_BETWEEN_KILLS = ["wait 0.1"] * 12 + ["hello"] * 12

AllIsWell = Callable[[list[Job]], None]


@pytest.mark.holds(
    "docs/reliability.md#the-chaos-tests",
    "SIGKILL all the time, of",
    "SIGKILL of a process to",
)
@pytest.mark.holds(
    "docs/reliability.md#what-is-promised-when-things-die",
    "An accepted job ends, and",
)
@pytest.mark.holds(
    "docs/alerts.md#an-alert-fired-what-does-it-mean-and-what-do-i-do",
    "A job is not lost by any of what follows",
)
@pytest.mark.holds("docs/operations.md#a-worker-was-killed-or-its-machine-is-gone-what-must-i-do", "Nothing.")
@pytest.mark.parametrize("lease_seconds", [SHORT.lease_seconds])
def test_no_job_is_lost_or_doubled_when_workers_are_killed_all_the_time(
    broker: Broker, client: Client, workers: EchoWorkers, assert_all_is_well: AllIsWell, gate: Gate
) -> None:
    popped = [_kill_in_the_pop(broker, client, workers) for _ in range(SCALE.num_kills_in_the_pop)]
    lost = [jobs[-1] for jobs in popped]
    jobs = [*chain(*popped), *(client.submit(prompt="wait 0.1", max_attempts=MAX_ATTEMPTS) for _ in range(BACKLOG))]
    running = [workers.start() for _ in range(3)]
    num_cut_off = 0
    for _ in range(SCALE.num_kills):
        jobs += [client.submit(prompt=prompt, max_attempts=MAX_ATTEMPTS) for prompt in PROMPTS_BETWEEN_KILLS]
        victim = running.pop(0)
        eventually(victim.held_jobs, within_seconds=30)
        num_cut_off += len(victim.kill())
        running.append(workers.start())

    wait_for_all(broker.redis, jobs, within_seconds=60 + SCALE.num_kills)
    gate(
        f"{SCALE.num_kills} SIGKILLs under {len(jobs)} jobs, {num_cut_off} attempts cut off, {len(lost)} messages lost",
        "0 lost, 0 doubled",
        "0 lost, 0 doubled",
    )
    assert num_cut_off >= SCALE.num_kills
    assert all(f"job {job.id}: its message was lost" in workers.logs for job in lost)
    given_up = [job for job in jobs if job.state is JobState.FAILED]
    for job in given_up:
        outcome = outcome_of(broker.redis, job)
        assert isinstance(outcome, JobFailure)
        assert outcome.code is ErrorCode.WORKER_LOST
        # A death while it waited is not among them.
        assert outcome.attempts >= MAX_ATTEMPTS
    assert len(given_up) <= SCALE.num_kills / MAX_ATTEMPTS
    assert_all_is_well([job for job in jobs if job not in given_up])


def _kill_in_the_pop(broker: Broker, client: Client, workers: EchoWorkers) -> list[Job]:
    """The last job's message went, by the server, to a process that died before it could tell anybody."""
    (victim,) = workers.start_ready()
    jobs = []
    while True:
        victim.freeze()
        jobs.append(client.submit(prompt="hello"))
        if broker.num_messages == 0:
            break
        # It was between two pops, or had something to do.
        victim.thaw()
        wait_for_all(broker.redis, jobs, within_seconds=30)
    victim.kill()
    assert jobs[-1].state is JobState.QUEUED
    return jobs


@pytest.mark.holds(
    "docs/reliability.md#the-chaos-tests",
    "SIGKILL of a worker with",
)
@pytest.mark.holds(
    "docs/reliability.md#promises",
    "A dead worker's jobs start",
)
@pytest.mark.holds(
    "docs/operations.md#a-worker-was-killed-or-its-machine-is-gone-what-must-i-do",
    "The other workers take its jobs up once their leases have ended",
)
def test_all_jobs_of_a_killed_worker_start_again_within_its_lease(
    broker: Broker, client: Client, workers: EchoWorkers, gate: Gate
) -> None:
    (victim,) = workers.start_ready()
    seconds = []
    for _ in range(SCALE.num_restarts):
        jobs = [client.submit(prompt="wait 600") for _ in range(8)]
        victim.wait_until_holding(8)
        (heir,) = workers.start_ready()
        assert len(victim.kill()) == 8
        killed_at = time.monotonic()
        heir.wait_until_holding(8, within_seconds=SCALE.restart_seconds)
        seconds.append(time.monotonic() - killed_at)
        assert attempts_of(broker.redis, jobs) == [2] * 8
        for job in jobs:
            job.cancel()
        wait_for_all(broker.redis, jobs, within_seconds=30)
        victim = heir

    gate(
        f"SIGKILL of a worker with 8 jobs, {len(seconds)} x: all run elsewhere after",
        f"{min(seconds):.1f} to {max(seconds):.1f} s",
        f"{SCALE.restart_seconds:g} s",
    )


@pytest.mark.holds(
    "docs/reliability.md#the-chaos-tests",
    "a job that kills its",
)
@pytest.mark.holds(
    "docs/reliability.md#promises",
    "After `max_attempts` deaths it is",
    "Whatever died with its worker",
)
@pytest.mark.holds(
    "docs/alerts.md#keyeworkerrestarts",
    "If one job does it, it soon runs alone and fails as `WORKER_LOST`.",
)
@pytest.mark.holds(
    "docs/operations.md#a-worker-was-killed-or-its-machine-is-gone-what-must-i-do",
    "The attempt counts: a job that kills its worker each time ends as `WORKER_LOST`",
)
def test_a_job_that_kills_its_worker_is_a_dead_letter_and_its_neighbours_succeed(
    broker: Broker, client: Client, workers: EchoWorkers, assert_all_is_well: AllIsWell, gate: Gate
) -> None:
    good = [client.submit(prompt="wait 0.2") for _ in range(10)]
    poison = client.submit(prompt="die")
    good += [client.submit(prompt="wait 0.2") for _ in range(10)]
    num_deaths = 0
    while not poison.state.is_final:
        worker = workers.start()
        eventually(lambda w=worker: not w.process.is_alive() or poison.state.is_final, 10 * SCALE.lease_seconds)
        num_deaths += not worker.process.is_alive()

    gate("a job that kills its process, beside 20 good ones", f"{num_deaths} deaths", "3 deaths, 20 of 20 succeed")
    assert 1 <= num_deaths <= 3
    outcome = outcome_of(broker.redis, poison)
    assert isinstance(outcome, JobFailure)
    assert outcome.code is ErrorCode.WORKER_LOST
    assert poison.id in broker.redis.zrange(keys.DEAD_LETTERS, 0, -1)
    wait_for_all(broker.redis, good, within_seconds=10 * SCALE.lease_seconds)
    assert_all_is_well(good)


@pytest.mark.holds(
    "docs/reliability.md#the-chaos-tests",
    "SIGSTOP past the lease, then",
)
@pytest.mark.holds("docs/operations.md#redis-was-away-what-must-i-do", "only one of the two results is kept")
def test_a_frozen_worker_that_wakes_up_settles_nothing(
    broker: Broker, client: Client, workers: EchoWorkers, assert_all_is_well: AllIsWell, gate: Gate
) -> None:
    (sleeper,) = workers.start_ready()
    jobs = [client.submit(prompt="wait 2") for _ in range(4)]
    sleeper.wait_until_holding(4)
    sleeper.freeze()
    heir = workers.start()
    wait_for_all(broker.redis, jobs, within_seconds=10 * SCALE.lease_seconds)
    outcomes = [outcome_of(broker.redis, job) for job in jobs]
    sleeper.thaw()
    after = client.submit(prompt="hello")
    eventually(lambda: sleeper.log.count("lease lost") == 4, within_seconds=30)

    gate("SIGSTOP past the lease, then SIGCONT: late outcomes discarded", "4 of 4", "4 of 4")
    assert [outcome_of(broker.redis, job) for job in jobs] == outcomes
    assert {o.worker.pid for o in outcomes if isinstance(o, JobResult)} == {heir.pid}
    wait_for_all(broker.redis, [after], within_seconds=30)
    assert_all_is_well([*jobs, after])
