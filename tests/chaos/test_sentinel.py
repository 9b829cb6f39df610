"""Sentinels choose another server, as planned or because the first was killed, under running jobs and new ones."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from pydantic import SecretStr

from keye.config import keys
from keye.config.settings import Settings
from keye.producer import Client, Job, QueueUnavailable
from tests.chaos.conftest import Gate
from tests.chaos.echo_workers import EchoWorkers
from tests.chaos.ledger import assert_each_succeeded_once, assert_nothing_is_left, count_ended, wait_for_all
from tests.support.conditions import eventually
from tests.support.redis_server import RedisServer, Sentinels

LEASE_SECONDS = 3
NUM_JOBS, NUM_SUBMITS = 300, 200


@dataclass
class Group:
    primary: RedisServer
    replica: RedisServer
    sentinels: Sentinels

    def replace_as_planned(self) -> None:
        self.sentinels.ask("failover", "group")

    def kill_the_primary(self) -> None:
        self.primary.kill()


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Group]:
    with RedisServer(tmp_path / "one") as primary, RedisServer(tmp_path / "two") as replica:
        replica.redis.replicaof("127.0.0.1", primary.port)
        eventually(lambda: replica.redis.info("replication")["master_link_status"] == "up")
        with Sentinels(tmp_path / "sentinels", primary.port, "group") as sentinels:
            eventually(lambda: sentinels.all_know(num_replicas=1))
            yield Group(primary, replica, sentinels)


class Submitter(threading.Thread):
    """Submits a job at a time, and again under its key where it was not accepted."""

    def __init__(self, client: Client) -> None:
        super().__init__()
        self._client = client
        self.jobs: list[Job] = []
        self.num_refused = 0

    def run(self) -> None:
        while len(self.jobs) < NUM_SUBMITS:
            key = f"key {len(self.jobs)}"
            try:
                self.jobs.append(self._client.submit(prompt="wait 0.02", idempotency_key=key))
            except QueueUnavailable:
                self.num_refused += 1
            time.sleep(0.02)


@pytest.mark.holds(
    "docs/reliability.md#promises",
    "A failover by Sentinels loses no accepted job.",
    "With `sentinel://` `submit` returns once a replica has the job",
)
@pytest.mark.holds("docs/reliability.md#the-chaos-tests", "Sentinels choose another server, as planned")
@pytest.mark.parametrize("replace", [Group.replace_as_planned, Group.kill_the_primary])
def test_no_accepted_job_is_lost(replace: Callable[[Group], None], group: Group, gate: Gate, tmp_path: Path) -> None:
    workers = EchoWorkers(group.sentinels.url, group.primary.redis, tmp_path, LEASE_SECONDS)
    try:
        with Client(group.sentinels.url) as client:
            jobs = [job for job in client.submit_many([{"prompt": "wait 0.1"}] * NUM_JOBS) if isinstance(job, Job)]
            assert len(jobs) == NUM_JOBS
            workers.start_ready(2)
            submitter = Submitter(client)
            submitter.start()
            eventually(lambda: len(submitter.jobs) > NUM_SUBMITS / 10 and count_ended(group.primary.redis, jobs) > 10)
            assert count_ended(group.primary.redis, jobs) < NUM_JOBS

            replace(group)
            began = time.monotonic()
            new = group.replica.redis
            eventually(lambda: new.info("replication")["role"] == "master")
            submitter.join(60)
            assert len(submitter.jobs) == NUM_SUBMITS, submitter.num_refused
            seconds = time.monotonic() - began
            everything = jobs + submitter.jobs
            lost = [job for job in everything if not new.exists(keys.record(job.id))]
            assert not lost, f"{len(lost)} of {len(everything)}"
            wait_for_all(new, everything, within_seconds=60)
            gate(f"Sentinels: {replace.__name__}, {len(everything)} jobs: submits go on", f"{seconds:.1f} s", "0 lost")
            assert_each_succeeded_once(new, everything)
            assert_nothing_is_left(client, new, LEASE_SECONDS)
    finally:
        workers.end()


def test_a_group_whose_replica_is_away_takes_jobs_all_the_same(group: Group) -> None:
    with Client(Settings(redis_url=SecretStr(group.sentinels.url), key_prefix="blue:")) as client:
        assert client.submit(prompt="?").state == "QUEUED"
        group.replica.kill()
        began = time.monotonic()
        jobs = client.submit_many([{"prompt": "?"}] * 20)
        assert [job.state for job in jobs] == ["QUEUED"] * 20
        # Until the Sentinels, too, know that it is away.
        assert time.monotonic() - began < 10
