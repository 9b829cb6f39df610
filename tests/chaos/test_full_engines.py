"""Workers die under as many jobs as an engine runs: few of them are suspected, and soon all goes on as before."""

import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import cycle, islice
from pathlib import Path
from threading import Event, Thread
from typing import cast

import pytest
from redis import Redis

from keye.config import keys
from keye.config.codes import ErrorCode, JobState
from keye.config.job import Priority
from keye.config.outcome import JobFailure
from keye.config.topology import message_list
from keye.producer import Client, Job
from keye.worker.daemon.exit_codes import ExitCode
from tests.chaos.broker import Broker
from tests.chaos.conftest import Gate
from tests.chaos.echo_workers import EchoWorker, EchoWorkers
from tests.chaos.ledger import assert_nothing_is_left, outcome_of, wait_for_all
from tests.support.conditions import eventually
from tests.support.scale import SCALE

MAX_RUNNING = 64
MAX_SUSPECTS = 8
# Of different lengths, so that they do not end all at once for ever.
JOB_SECONDS = SCALE.full_engine_job_seconds
PROMPTS = [f"wait {JOB_SECONDS * share:.2f}" for share in (0.8, 0.9, 1, 1.1, 1.2)]
RECOVERY_SECONDS = SCALE.restart_seconds + 60
WINDOW_SECONDS = 3 * JOB_SECONDS
# Whoever waits for its place among those whose worker died once waits for longer.
MAX_ATTEMPT_SECONDS = 6 * JOB_SECONDS

AllIsWell = Callable[[list[Job]], None]


@pytest.fixture
def workers(broker: Broker, tmp_path: Path, lease_seconds: float) -> Iterator[EchoWorkers]:
    settings = {"ECHO_MAX_RUNNING": str(MAX_RUNNING)}
    workers = EchoWorkers(broker.url, broker.redis, tmp_path, lease_seconds, **settings)
    yield workers
    workers.end()


class Flow:
    """Jobs that keep the queue from running dry."""

    def __init__(self, client: Client, redis: Redis) -> None:
        self.jobs: list[Job] = []
        self._client = client
        self._redis = redis
        self._is_over = Event()
        self._prompts = cycle(PROMPTS)
        self._thread = Thread(target=self._run)
        self._thread.start()

    def end(self) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_over.wait(0.05):
            if self._redis.llen(message_list(Priority.NORMAL)) < MAX_RUNNING:
                new = [{"prompt": prompt} for prompt in islice(self._prompts, MAX_RUNNING)]
                self.jobs += cast(list[Job], self._client.submit_many(new))


@pytest.fixture
def flow(client: Client, broker: Broker) -> Iterator[Flow]:
    flow = Flow(client, broker.redis)
    yield flow
    flow.end()


def records(redis: Redis, job_ids: Iterable[str]) -> list[dict[str, str]]:
    with redis.pipeline(transaction=False) as reading:
        for job_id in job_ids:
            reading.hgetall(keys.record(job_id))
        return reading.execute()


def begun_in(worker: EchoWorker, redis: Redis) -> dict[str, dict[str, str]]:
    """Records by id of the jobs that it holds and that do not wait."""
    held = worker.held_jobs()
    found = zip(held, records(redis, held), strict=True)
    return {job_id: record for job_id, record in found if record.get("waits") != record["attempts"]}


@pytest.mark.holds("docs/reliability.md#the-chaos-tests", "SIGKILL of a worker under 64 running jobs")
@pytest.mark.holds("docs/design.md#decisions", "Once proves little (deployments kill whole batches)")
@pytest.mark.holds("docs/reliability.md#promises", "Of those whose worker died once eight at a time run in a process")
@pytest.mark.holds(
    "docs/operations.md#a-worker-was-killed-or-its-machine-is-gone-what-must-i-do",
    "Of jobs whose worker died once eight at a time run in a process",
)
@pytest.mark.holds("docs/operations.md#how-long-may-a-job-take", "waits after a death")
def test_two_deaths_under_a_full_engine_leave_few_suspects_and_soon_as_much_is_done_as_before(
    broker: Broker, workers: EchoWorkers, flow: Flow, assert_all_is_well: AllIsWell, gate: Gate
) -> None:
    redis = broker.redis

    def clock() -> float:
        seconds, microseconds = redis.time()
        return seconds + microseconds / 1e6

    def num_ended(since: float) -> int:
        """In so many seconds from that time on; 0 while they are not over."""
        until = since + WINDOW_SECONDS
        return len(redis.xrange(keys.ENDED, int(since * 1000), int(until * 1000))) if clock() > until else 0

    def is_full() -> bool:
        return len(begun_in(worker, redis)) >= MAX_RUNNING

    def kill() -> dict[str, dict[str, str]]:
        worker.kill()
        begun = begun_in(worker, redis)
        assert len(begun) >= 0.9 * MAX_RUNNING
        return begun

    def all_that_died_are_there() -> bool:
        return is_full() and all(record["attempts"] > "1" for record in records(redis, died))

    def have_ended(job_ids: list[str]) -> bool:
        return all(JobState(record["state"]).is_final for record in records(redis, job_ids))

    (worker,) = workers.start_ready(KEYE_MAX_ATTEMPT_SECONDS=str(MAX_ATTEMPT_SECONDS))
    eventually(is_full)
    began_at = clock() + JOB_SECONDS
    before = eventually(lambda: num_ended(began_at), within_seconds=60)

    eventually(is_full)
    died = list(kill())
    (worker,) = workers.start_ready(KEYE_MAX_ATTEMPT_SECONDS=str(MAX_ATTEMPT_SECONDS))
    eventually(all_that_died_are_there, within_seconds=10 * SCALE.lease_seconds)
    suspects = [job_id for job_id, record in kill().items() if record.get("deaths")]
    killed_at = clock()
    (worker,) = workers.start_ready(KEYE_MAX_ATTEMPT_SECONDS=str(MAX_ATTEMPT_SECONDS))
    eventually(lambda: have_ended(suspects), within_seconds=RECOVERY_SECONDS)
    resumed_at = clock()

    def as_much_is_done() -> bool:
        nonlocal resumed_at
        resumed_at = max(resumed_at, clock() - WINDOW_SECONDS)
        return num_ended(resumed_at) >= 0.9 * before

    eventually(as_much_is_done, within_seconds=RECOVERY_SECONDS)
    seconds = resumed_at - killed_at
    flow.end()
    wait_for_all(redis, flow.jobs, within_seconds=60 + 60 * JOB_SECONDS)

    gate(
        f"two SIGKILLs under {MAX_RUNNING} running jobs of {JOB_SECONDS:g} s: as much is done as before after",
        f"{seconds:.1f} s, {len(suspects)} alone",
        f"{RECOVERY_SECONDS:g} s, {MAX_SUSPECTS} alone",
    )
    deaths = Counter(record.get("deaths") for record in records(redis, [job.id for job in flow.jobs]))
    assert 1 <= len(suspects) <= MAX_SUSPECTS
    assert deaths.keys() == {None, "1", "2"}
    assert deaths["2"] == len(suspects)
    assert seconds <= RECOVERY_SECONDS
    assert_all_is_well(flow.jobs)


@pytest.mark.holds(
    "docs/operations.md#a-worker-was-killed-or-its-machine-is-gone-what-must-i-do",
    "the rest of them wait for a place, can be cancelled meanwhile, and are given back",
)
def test_who_waits_for_its_place_among_those_that_died_once_is_ended_like_any_other(
    broker: Broker, client: Client, workers: EchoWorkers, tmp_path: Path
) -> None:
    may_end = tmp_path / "may_end"
    jobs = [client.submit(prompt=f"write {may_end}") for _ in range(4 * MAX_SUSPECTS)]
    (worker,) = workers.start_ready()
    eventually(lambda: len(begun_in(worker, broker.redis)) == len(jobs))
    worker.kill()
    (worker,) = workers.start_ready(drain_seconds=SCALE.drain_seconds)
    worker.wait_until_holding(len(jobs))
    eventually(lambda: len(begun_in(worker, broker.redis)) == MAX_SUSPECTS)
    begun = begun_in(worker, broker.redis)
    waiting = [job for job in jobs if job.id not in begun]
    assert waiting[0].cancel()
    eventually(lambda: waiting[0].state is JobState.CANCELLED, within_seconds=5)
    worker.terminate()
    assert worker.exit_code(SCALE.drain_seconds + 10) == ExitCode.OK
    assert {job.state for job in jobs} == {JobState.CANCELLED, JobState.QUEUED}
    may_end.touch()
    worker = workers.start()
    kept = [job for job in jobs if job is not waiting[0]]
    wait_for_all(broker.redis, kept, within_seconds=60)
    assert [record["deaths"] for record in records(broker.redis, [job.id for job in kept])] == ["1"] * len(kept)
    assert {job.result(timeout=1).worker.pid for job in kept} == {worker.pid}
    assert_nothing_is_left(client, broker.redis, SCALE.lease_seconds)


@pytest.mark.holds("docs/reliability.md#the-chaos-tests", "a job that kills its process, beside 63")
def test_a_job_that_kills_a_full_engine_costs_three_deaths_and_none_of_its_neighbours(
    broker: Broker, client: Client, workers: EchoWorkers, assert_all_is_well: AllIsWell, gate: Gate, tmp_path: Path
) -> None:
    redis = broker.redis
    dies, may_end = tmp_path / "dies", tmp_path / "may_end"

    def num_in_engine() -> int:
        """But for the one that kills: those that have written."""
        with redis.pipeline(transaction=False) as reading:
            for job in good:
                reading.xrevrange(keys.events(job.id), count=1)
            return sum('"text"' in event["event"] for newest in reading.execute() for _, event in newest)

    # The first to have its place, whatever order the others come in.
    poison = client.submit(prompt=f"die {dies}", priority="high")
    good = [client.submit(prompt=f"write {may_end}") for _ in range(MAX_RUNNING - 1)]
    num_deaths = 0
    for num_beside in (MAX_RUNNING - 1, MAX_SUSPECTS - 1, 0):
        worker = workers.start()
        eventually(lambda n=num_beside: num_in_engine() == n, within_seconds=10 * SCALE.lease_seconds)
        dies.touch()
        if num_beside == MAX_SUSPECTS - 1:
            may_end.touch()
        assert worker.exit_code(10 * SCALE.lease_seconds) == -signal.SIGKILL
        num_deaths += 1
        dies.unlink()
    workers.start()
    wait_for_all(redis, [poison, *good], within_seconds=60 + 4 * SCALE.lease_seconds)

    deaths = Counter(record["deaths"] for record in records(redis, [job.id for job in good]))
    gate(
        f"a job that kills its process, beside {len(good)} good ones in the engine",
        f"{num_deaths} deaths, {deaths['2']} alone",
        f"3 deaths, {MAX_SUSPECTS - 1} alone, {len(good)} of {len(good)} succeed",
    )
    outcome = outcome_of(redis, poison)
    assert isinstance(outcome, JobFailure)
    assert outcome.code is ErrorCode.WORKER_LOST
    assert outcome.attempts == num_deaths
    assert deaths == {"1": MAX_RUNNING - MAX_SUSPECTS, "2": MAX_SUSPECTS - 1}
    assert_all_is_well(good)
