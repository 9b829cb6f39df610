"""The server dies under queued and running jobs and comes back with its append-only file, or refuses to write."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from keye.config.job import Priority
from keye.producer import Client, Job
from tests.chaos.broker import Broker
from tests.chaos.conftest import Gate
from tests.chaos.echo_workers import EchoWorkers
from tests.chaos.ledger import attempts_of, count_ended, wait_for_all
from tests.support.conditions import eventually
from tests.support.scale import SCALE

AllIsWell = Callable[[list[Job]], None]


def _seconds_until_more_end(broker: Broker, jobs: list[Job], num_ended: int) -> float:
    """Since the server was back, which is now."""
    back_at = time.monotonic()
    eventually(lambda: count_ended(broker.redis, jobs) > num_ended, within_seconds=35)
    return time.monotonic() - back_at


def test_a_worker_that_has_room_for_more_jobs_outlives_its_server(
    broker: Broker, client: Client, workers: EchoWorkers, assert_all_is_well: AllIsWell
) -> None:
    (worker,) = workers.start_ready()
    running = [client.submit(prompt=f"wait {2 * SCALE.lease_seconds}") for _ in range(6)]
    worker.wait_until_holding(6)
    broker.kill()
    eventually(lambda: "Connection to broker lost" in worker.log)
    broker.start_again()
    after = client.submit(prompt="hello")
    wait_for_all(broker.redis, [*running, after], within_seconds=20 * SCALE.lease_seconds)
    assert "Unrecoverable" not in worker.log
    assert attempts_of(broker.redis, running) == [1] * 6
    assert_all_is_well([*running, after])


@pytest.mark.holds(
    "docs/reliability.md#the-chaos-tests",
    "SIGKILL of the server for",
)
@pytest.mark.holds(
    "docs/reliability.md#promises",
    "Once `submit` has returned, the",
)
@pytest.mark.holds("docs/alerts.md#keyeredisdown", "Workers need nothing")
@pytest.mark.holds(
    "docs/operations.md#redis-was-away-what-must-i-do",
    "Nothing.",
    "Workers wait for it, finish what they are running and write the results when it is back.",
)
@pytest.mark.parametrize("away_seconds", SCALE.broker_away_seconds)
def test_a_killed_broker_loses_and_doubles_nothing(
    broker: Broker,
    client: Client,
    workers: EchoWorkers,
    assert_all_is_well: AllIsWell,
    gate: Gate,
    away_seconds: float,
) -> None:
    short = [client.submit(prompt="wait 0.03") for _ in range(500)]
    # They run before the short ones; two end while the server is away, six a lease later.
    ends_after = [away_seconds] * 2 + [away_seconds + SCALE.lease_seconds] * 6
    long = [client.submit(prompt=f"wait {seconds}", priority=Priority.HIGH) for seconds in ends_after]
    worker = workers.start(KEYE_CONCURRENCY=str(len(long)))
    worker.wait_until_holding(len(long))

    broker.kill()
    time.sleep(away_seconds)
    broker.start_again()
    assert count_ended(broker.redis, short) == 0
    seconds = _seconds_until_more_end(broker, short, 0)
    gate(
        f"SIGKILL of the server for {away_seconds:g} s under 500 queued and 8 running jobs: the next ends after",
        f"{seconds:.1f} s",
        "35 s, 0 lost, 0 doubled",
    )
    wait_for_all(broker.redis, long + short, within_seconds=60 + 2 * SCALE.lease_seconds)

    assert sum(f"settling job {job.id}: Redis is away" in worker.log for job in long) == 2
    # Nobody but the server died.
    assert attempts_of(broker.redis, long) == [1] * len(long)
    assert_all_is_well(long + short)


@pytest.mark.holds(
    "docs/reliability.md#not-there-yet",
    "`min-replicas-to-write` makes such a server",
)
@pytest.mark.holds(
    "docs/reliability.md#the-chaos-tests",
    "a server that is full,",
)
@pytest.mark.holds(
    "docs/operations.md#redis-is-full-what-must-i-do",
    "Nothing is lost meanwhile",
    "go on by themselves",
)
def test_a_broker_that_refuses_to_write_loses_and_doubles_nothing(
    broker: Broker, client: Client, workers: EchoWorkers, assert_all_is_well: AllIsWell, gate: Gate
) -> None:
    (worker,) = workers.start_ready()
    jobs: list[Job] = []
    for what, option, value in (("is full", "maxmemory", "1mb"), ("has no replicas", "min-replicas-to-write", "1")):
        jobs += [client.submit(prompt="wait 1") for _ in range(4)]
        worker.wait_until_holding(4)
        # These it meets only when it may not even note that it has them.
        worker.freeze()
        jobs += [client.submit(prompt="wait 1") for _ in range(12)]
        with broker.refusing_writes(option, value):
            worker.thaw()
            time.sleep(SCALE.refusal_seconds)
            num_ended = count_ended(broker.redis, jobs)
        seconds = _seconds_until_more_end(broker, jobs, num_ended)
        gate(
            f"a server that {what} and refuses for {SCALE.refusal_seconds:g} s: the next job ends after",
            f"{seconds:.1f} s",
            "35 s, 0 lost, process alive",
        )
        # Messages that it took meanwhile come back after two leases.
        wait_for_all(broker.redis, jobs, within_seconds=60 + 2 * SCALE.lease_seconds)

    assert worker.process.is_alive()
    # Nobody wants to read it six times a second, or with the ways through Celery that it took.
    # Once in 10 s, for each of the two refusals and for a while after it.
    assert 0 < worker.log.count("Trying to reconnect") <= 2 * (SCALE.refusal_seconds / 10 + 4)
    assert "Traceback" not in worker.log
    # Longer than a lease, and nobody died.
    assert attempts_of(broker.redis, jobs) == [1] * len(jobs)
    assert_all_is_well(jobs)


@pytest.mark.holds(
    "docs/operations.md#redis-was-away-what-must-i-do",
    "Until then results lie in `KEYE_SPOOL_FOLDER` too",
)
def test_answers_of_a_worker_killed_while_the_broker_is_full_are_not_lost(
    broker: Broker, client: Client, workers: EchoWorkers, assert_all_is_well: AllIsWell, tmp_path: Path
) -> None:
    (worker,) = workers.start_ready()
    jobs = [client.submit(prompt="wait 3") for _ in range(4)]
    worker.wait_until_holding(len(jobs))
    with broker.refusing_writes("maxmemory", "1mb"):
        eventually(lambda: len(list(tmp_path.glob("spool/*/*.json"))) == len(jobs), within_seconds=10)
        assert len(worker.kill()) == len(jobs)
        assert count_ended(broker.redis, jobs) == 0
    workers.start_ready()
    wait_for_all(broker.redis, jobs, within_seconds=10)

    assert {job.result(timeout=1).worker.pid for job in jobs} == {worker.pid}
    assert attempts_of(broker.redis, jobs) == [1] * len(jobs)
    assert list(tmp_path.glob("spool/*/*")) == []
    assert_all_is_well(jobs)


@pytest.mark.holds(
    "docs/reliability.md#the-chaos-tests",
    "SIGTERM of a worker that",
)
@pytest.mark.holds(
    "docs/reliability.md#promises",
    "While Redis is away the",
)
def test_a_worker_that_is_ended_while_the_broker_is_away_leaves_in_time_and_its_answers_to_the_next(
    broker: Broker, client: Client, workers: EchoWorkers, assert_all_is_well: AllIsWell, gate: Gate, tmp_path: Path
) -> None:
    worker = workers.start(drain_seconds=SCALE.lease_seconds / 3)
    worker.wait_until_ready()
    jobs = [client.submit(prompt="wait 1") for _ in range(4)]
    worker.wait_until_holding(len(jobs))
    broker.kill()
    eventually(lambda: len(list(tmp_path.glob("spool/*/*.json"))) == len(jobs), within_seconds=10)
    worker.terminate()
    told_at = time.monotonic()
    # Beyond the drain as much as the supervisor waits before it kills. Celery itself may end with 1: it cannot give its
    # messages back.
    assert worker.exit_code(within_seconds=SCALE.lease_seconds / 3 + 10) is not None
    gate("SIGTERM while the server is away: exits after", f"{time.monotonic() - told_at:.1f} s", "drain + 10 s")
    broker.start_again()
    workers.start_ready()
    wait_for_all(broker.redis, jobs, within_seconds=10)

    assert attempts_of(broker.redis, jobs) == [1] * len(jobs)
    assert_all_is_well(jobs)


@pytest.mark.holds("docs/reliability.md#promises", "what is lost then is an error in the log")
def test_answers_that_neither_the_broker_nor_the_disk_took_are_told_of_as_lost_and_run_again(
    broker: Broker, client: Client, workers: EchoWorkers, assert_all_is_well: AllIsWell, tmp_path: Path
) -> None:
    (tmp_path / "spool").touch()
    worker = workers.start(drain_seconds=1)
    worker.wait_until_ready()
    jobs = [client.submit(prompt="wait 1") for _ in range(4)]
    worker.wait_until_holding(len(jobs))
    broker.kill()
    eventually(lambda: worker.log.count("outcome is kept in memory only") == len(jobs))
    worker.terminate()
    assert worker.exit_code(within_seconds=60) is not None, "how soon is tried above"
    for job in jobs:
        assert f"job {job.id}: its outcome is lost, SUCCEEDED: neither Redis nor" in worker.log
    (tmp_path / "spool").unlink()
    broker.start_again()
    workers.start_ready()
    wait_for_all(broker.redis, jobs, within_seconds=60 + 2 * SCALE.lease_seconds)
    assert attempts_of(broker.redis, jobs) == [2] * len(jobs)
    assert_all_is_well(jobs)
