"""Processes die or freeze under their jobs: every job ends once, and soon."""

import time

from config import keys
from config.error_codes import ErrorCode
from config.outcome import JobFailure, JobResult
from config.state import JobState
from producer import Client
from tests.acceptance.conftest import eventually
from tests.chaos.conftest import (
    LEASE_SECONDS,
    Broker,
    Workers,
    assert_each_succeeded_once,
    assert_nothing_is_left,
    outcome_of,
    wait_for_all,
)

NUM_KILLS = 30
BACKLOG = 500
JOBS_BETWEEN_KILLS = 50
# A lease, the reaper's two turns, and a process that may have to take a late delivery first.
RESTART_SECONDS = LEASE_SECONDS + 3


def test_no_job_is_lost_or_doubled_when_workers_are_killed_all_the_time(
    broker: Broker, client: Client, workers: Workers
) -> None:
    # Ten attempts: what is counted here is lost jobs, not jobs given up.
    jobs = [client.submit(prompt="wait 0.1", max_attempts=10) for _ in range(BACKLOG)]
    running = [workers.start() for _ in range(3)]
    num_cut_off = 0
    for _ in range(NUM_KILLS):
        jobs += [client.submit(prompt="wait 0.1", max_attempts=10) for _ in range(JOBS_BETWEEN_KILLS)]
        victim = running.pop(0)
        eventually(victim.held_jobs, within_seconds=30)
        num_cut_off += len(victim.kill())
        running.append(workers.start())

    wait_for_all(broker, jobs, within_seconds=60)
    print(f"{NUM_KILLS} kills cut off {num_cut_off} attempts of {len(jobs)} jobs")
    assert num_cut_off >= NUM_KILLS
    assert_each_succeeded_once(broker, jobs)
    assert_nothing_is_left(broker, client)


def test_all_jobs_of_a_killed_worker_start_again_within_its_lease(
    broker: Broker, client: Client, workers: Workers
) -> None:
    victim = workers.start()
    victim.wait_until_ready()
    jobs = [client.submit(prompt="wait 30") for _ in range(8)]
    eventually(lambda: len(victim.held_jobs()) == 8, within_seconds=10)
    heir = workers.start()
    heir.wait_until_ready()

    assert len(victim.kill()) == 8
    killed_at = time.monotonic()
    eventually(lambda: len(heir.held_jobs()) == 8, within_seconds=RESTART_SECONDS)

    print(f"8 jobs ran again {time.monotonic() - killed_at:.1f} s after SIGKILL")
    assert {broker.redis.hget(keys.record(job.id), "attempts") for job in jobs} == {"2"}


def test_a_job_that_kills_its_worker_is_a_dead_letter_and_its_neighbours_succeed(
    broker: Broker, client: Client, workers: Workers
) -> None:
    good = [client.submit(prompt="wait 0.2") for _ in range(10)]
    poison = client.submit(prompt="die")
    good += [client.submit(prompt="wait 0.2") for _ in range(10)]
    num_deaths = 0
    worker = workers.start()
    while True:
        process = worker.process
        eventually(lambda p=process: p.poll() is not None or poison.state.is_final, within_seconds=30)
        if process.poll() is None:
            break
        num_deaths += 1
        worker = workers.start()

    assert 1 <= num_deaths <= 3
    outcome = outcome_of(broker, poison)
    assert isinstance(outcome, JobFailure)
    assert outcome.code is ErrorCode.WORKER_LOST
    assert poison.id in broker.redis.zrange(keys.dead_letters(), 0, -1)
    wait_for_all(broker, good, within_seconds=30)
    assert_each_succeeded_once(broker, good)
    assert_nothing_is_left(broker, client)


def test_a_frozen_worker_that_wakes_up_settles_nothing(broker: Broker, client: Client, workers: Workers) -> None:
    sleeper = workers.start()
    sleeper.wait_until_ready()
    jobs = [client.submit(prompt="wait 1") for _ in range(4)]
    eventually(lambda: len(sleeper.held_jobs()) == 4, within_seconds=10)
    sleeper.freeze()
    heir = workers.start()
    wait_for_all(broker, jobs, within_seconds=30)
    outcomes = [outcome_of(broker, job) for job in jobs]
    sleeper.thaw()
    after = client.submit(prompt="hello")
    eventually(lambda: sleeper.log.count("lease lost") == 4, within_seconds=10)

    assert [outcome_of(broker, job) for job in jobs] == outcomes
    assert {o.worker.pid for o in outcomes if isinstance(o, JobResult)} == {heir.process.pid}
    wait_for_all(broker, [after], within_seconds=10)
    assert after.state is JobState.SUCCEEDED
    assert_each_succeeded_once(broker, jobs)
    assert_nothing_is_left(broker, client)
