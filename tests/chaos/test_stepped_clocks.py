"""The server's clock is set while jobs run, as by a failover to a host that is ahead or behind: that is no time."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from keye.config import keys
from keye.config.codes import JobState
from keye.producer import Client, Job
from tests.chaos.broker import Broker
from tests.chaos.conftest import Gate
from tests.chaos.echo_workers import EchoWorkers
from tests.chaos.ledger import attempts_of, wait_for_all
from tests.chaos.stepped_clock import SteppedClock
from tests.support.conditions import eventually

AllIsWell = Callable[[list[Job]], None]


@pytest.fixture
def clock(tmp_path: Path) -> SteppedClock:
    return SteppedClock(tmp_path)


@pytest.fixture
def broker(tmp_path: Path, clock: SteppedClock) -> Iterator[Broker]:
    broker = Broker(tmp_path / "valkey", clock.environ)
    yield broker
    broker.stop()


def shown(broker: Broker) -> float:
    seconds, microseconds = broker.redis.time()
    return seconds + microseconds / 1e6


def begin_jobs(client: Client, broker: Broker, number: int, seconds: float, **options: float) -> list[Job]:
    """So many jobs that take so long, each begun."""
    jobs = [client.submit(prompt=f"wait {seconds}", **options) for _ in range(number)]
    eventually(lambda: attempts_of(broker.redis, jobs) == [1] * number)
    return jobs


def step(broker: Broker, clock: SteppedClock, seconds: float) -> None:
    ahead = shown(broker) - time.time()
    clock.step(seconds)
    eventually(lambda: abs(shown(broker) - time.time() - ahead - seconds) < 1)


@pytest.mark.holds(
    "docs/reliability.md#promises",
    "A clock that is set is not taken for time.",
    "Leases count by the server's clock, and a failover",
    "Where it was set forward, they take no job",
)
@pytest.mark.holds("docs/reliability.md#the-chaos-tests", "the server's clock, set forward by 120 s")
@pytest.mark.parametrize("steps", [[120], [120, 120, -240, 3600]], ids=["once", "again and again"])
def test_running_jobs_start_once_when_the_clock_is_set_forward(
    broker: Broker,
    clock: SteppedClock,
    client: Client,
    workers: EchoWorkers,
    lease_seconds: float,
    assert_all_is_well: AllIsWell,
    gate: Gate,
    steps: list[int],
) -> None:
    workers.start_ready(2)
    jobs = begin_jobs(client, broker, 12, 4 * lease_seconds)
    for seconds in steps:
        step(broker, clock, seconds)
        time.sleep(lease_seconds / 2)  # renewals come meanwhile, or not
    late = workers.start()
    late.wait_until_ready()
    wait_for_all(broker.redis, jobs, within_seconds=20 * lease_seconds)
    starts = attempts_of(broker.redis, jobs)
    gate(f"the server's clock set by {steps} s under 12 running jobs", f"{sum(starts)} starts", "12 starts")
    assert starts == [1] * 12
    assert_all_is_well(jobs)


@pytest.mark.holds("docs/reliability.md#promises", "jobs start again within three leases.")
@pytest.mark.holds("docs/reliability.md#the-chaos-tests", "the same, set back by 600 s")
def test_a_dead_workers_jobs_start_again_after_the_clock_was_set_back(
    broker: Broker,
    clock: SteppedClock,
    client: Client,
    workers: EchoWorkers,
    lease_seconds: float,
    assert_all_is_well: AllIsWell,
    gate: Gate,
) -> None:
    (victim,) = workers.start_ready()
    jobs = [client.submit(prompt=f"wait {4 * lease_seconds}") for _ in range(8)]
    victim.wait_until_holding(8)
    workers.start_ready()
    eventually(lambda: broker.redis.pttl(keys.REAPER_TURN) > 0, within_seconds=10)
    # Before it could renew its leases by the new time, which would put them right.
    assert len(victim.kill()) == 8
    step(broker, clock, -600)
    killed_at = time.monotonic()
    bound = 3 * lease_seconds + 3
    eventually(lambda: attempts_of(broker.redis, jobs) == [2] * 8, within_seconds=bound)
    seconds = time.monotonic() - killed_at
    gate("the server's clock set back by 600 s after SIGKILL: 8 jobs run again", f"{seconds:.1f} s", f"{bound:g} s")
    wait_for_all(broker.redis, jobs, within_seconds=20 * lease_seconds)
    assert_all_is_well(jobs)


def test_a_worker_that_starts_after_the_clock_was_set_back_finds_what_the_dead_held(
    broker: Broker, clock: SteppedClock, client: Client, workers: EchoWorkers, lease_seconds: float, gate: Gate
) -> None:
    (victim,) = workers.start_ready()
    jobs = [client.submit(prompt="wait 0.1") for _ in range(3)] + [client.submit(prompt="wait 600") for _ in range(8)]
    wait_for_all(broker.redis, jobs[:3], within_seconds=30)
    victim.wait_until_holding(8)
    victim.kill()
    broker.kill()
    clock.step(-600)
    broker.start_again()
    workers.start_ready()
    ready_at = time.monotonic()
    eventually(lambda: attempts_of(broker.redis, jobs[3:]) == [2] * 8, within_seconds=3 * lease_seconds + 3)
    gate("the same, and nobody was there", f"{time.monotonic() - ready_at:.1f} s", f"{3 * lease_seconds + 3:g} s")
    present = {presence.worker.name for presence in client.status().workers}
    assert present == {workers.started[-1].name}, "who died before is not there for ten minutes"


@pytest.mark.holds("docs/reliability.md#promises", "pauses and places in the queue count from now")
@pytest.mark.holds("docs/reliability.md#the-chaos-tests", "the same, under a backlog of 40")
def test_a_backlog_waits_in_order_and_without_second_messages_when_the_clock_is_set_back(
    broker: Broker, clock: SteppedClock, client: Client, workers: EchoWorkers, lease_seconds: float, gate: Gate
) -> None:
    workers.start_ready(KEYE_CONCURRENCY="8")
    running = begin_jobs(client, broker, 8, 4 * lease_seconds)
    before = [client.submit(prompt="hello") for _ in range(20)]
    step(broker, clock, -600)
    eventually(lambda: broker.redis.zcount(keys.queued("normal"), shown(broker) + 1, "+inf") == 0, within_seconds=10)
    after = [client.submit(prompt="hello") for _ in range(20)]
    assert broker.redis.zrange(keys.queued("normal"), 0, -1) == [job.id for job in before + after]
    assert client.status().queues[1].oldest_seconds < 60
    # A message lost in the clock's future would be missed in ten minutes only.
    broker.redis.lrem("keye.jobs\x06\x163", 1, broker.redis.lindex("keye.jobs\x06\x163", -1))
    wait_for_all(broker.redis, running + before + after, within_seconds=20 * lease_seconds)
    assert attempts_of(broker.redis, running + before + after) == [1] * 48
    assert workers.logs.count("its message was lost") == 1
    gate("a backlog of 40 when the clock is set back by 600 s", "1 lost message found, 0 doubled", "1, 0")


@pytest.mark.holds("docs/reliability.md#promises", "A deadline is a time on that clock")
def test_a_deadline_is_a_time_on_the_servers_clock_and_a_running_attempt_keeps_the_time_it_had(
    broker: Broker, clock: SteppedClock, client: Client, workers: EchoWorkers, lease_seconds: float
) -> None:
    workers.start_ready(KEYE_CONCURRENCY="8")
    running = begin_jobs(client, broker, 8, 4 * lease_seconds, deadline_seconds=600)
    waiting = client.submit(prompt="hello", deadline_seconds=600)
    step(broker, clock, 3600)
    eventually(lambda: waiting.state is JobState.EXPIRED, within_seconds=2 * lease_seconds + 3)
    wait_for_all(broker.redis, running, within_seconds=20 * lease_seconds)
    assert {job.state for job in running} == {JobState.SUCCEEDED}


def test_running_jobs_start_once_where_the_server_comes_back_with_another_clock(
    broker: Broker,
    clock: SteppedClock,
    client: Client,
    workers: EchoWorkers,
    lease_seconds: float,
    assert_all_is_well: AllIsWell,
) -> None:
    workers.start_ready(2)
    jobs = begin_jobs(client, broker, 12, 4 * lease_seconds)
    broker.kill()
    clock.step(120)
    broker.start_again()
    wait_for_all(broker.redis, jobs, within_seconds=20 * lease_seconds)
    assert attempts_of(broker.redis, jobs) == [1] * 12
    assert_all_is_well(jobs)


@pytest.mark.holds("docs/reliability.md#promises", "A step of less than a fifteenth")
def test_a_clock_that_is_a_little_off_changes_nothing(
    broker: Broker, clock: SteppedClock, client: Client, workers: EchoWorkers, lease_seconds: float
) -> None:
    workers.start_ready(2)
    jobs = begin_jobs(client, broker, 8, 2 * lease_seconds)
    for _ in range(20):
        clock.step(lease_seconds / 100)
        clock.step(-lease_seconds / 50)
        clock.step(lease_seconds / 100)
    wait_for_all(broker.redis, jobs, within_seconds=20 * lease_seconds)
    assert {job.state for job in jobs} == {JobState.SUCCEEDED}
    assert attempts_of(broker.redis, jobs) == [1] * 8
    assert "clock was set" not in workers.logs
