"""`keye verify` on a real server: silent about every job on a legal way, loud about each that was pushed off it."""

import json
import time
from collections.abc import Iterator

import pytest
from redis import Redis
from typer.testing import CliRunner

from keye.config import keys
from keye.config.codes import ErrorCode, Stage
from keye.config.connection import connect
from keye.config.outcome import JobFailure
from keye.config.topology import QUEUE, UNACKED, message_list
from keye.config.wire import SealedJob
from keye.producer import Client, Job, Priority
from keye.producer.cli import app
from keye.producer.shell import ExitCode
from keye.worker.leases.claims import Claimed, QueuedJob
from keye.worker.leases.job_lease import LeaseStore
from keye.worker.results.settlement import Settlement


@pytest.fixture
def worker(redis_url: str) -> Iterator[Redis]:
    with connect(redis_url) as connection:
        yield connection


def claim(worker: Redis, job: Job) -> Claimed:
    sealed = SealedJob.model_validate_json(worker.hget(keys.record(job.id), "sealed"))
    claimed = LeaseStore(worker, lease_seconds=30).claim(QueuedJob.of(sealed), "gpu-1:7")
    assert isinstance(claimed, Claimed)
    return claimed


def failure(lease: Claimed, code: ErrorCode = ErrorCode.INTERNAL) -> JobFailure:
    return JobFailure(
        job_id=lease.job_id, code=code, message="no", stage=Stage.DECODE, retryable=False, attempts=lease.attempt
    )


def irregularities(client: Client) -> dict[str, str]:
    return {found.job_id: found.what for found in client.verify()[1]}


@pytest.mark.holds(
    "docs/operations.md#is-any-job-stuck-lost-or-in-two-places",
    "prints every job that is in no legal state",
)
def test_every_legal_way_of_a_job_is_passed_over(client: Client, worker: Redis) -> None:
    store, settlement = LeaseStore(worker, 30), Settlement(worker, 3600, 9000)
    waiting, running, again, cancelled, failed, requeued = (client.submit(prompt="?") for _ in range(6))
    late = client.submit(prompt="?", deadline_seconds=60)
    claim(worker, running)
    lease = claim(worker, again)
    store.retry(lease, failure(lease), 60, None)
    cancelled.cancel()
    for job, code in ((failed, "INTERNAL"), (requeued, "INTERNAL"), (late, "DEADLINE_EXCEEDED")):
        lease = claim(worker, job)
        assert settlement.settle(lease, failure(lease, ErrorCode(code)))
    client.dead_letters.requeue(client.dead_letters.find(requeued.id))

    ledger, found = client.verify()
    assert found == []
    assert ledger.num_in_state == {"QUEUED": 3, "RUNNING": 1, "CANCELLED": 1, "FAILED": 2, "EXPIRED": 1}
    assert waiting.id in ledger.messages


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        ("state", "THINKING", "no state of a job"),
        ("state", "RUNNING", "without a lease"),
        ("state", "SUCCEEDED", "without an outcome"),
        ("attempts", "3", "without an attempt left"),
        ("deadline_at", "1000", "past its deadline"),
        ("outcome", "{}", "has an outcome"),
    ],
)
def test_record_that_contradicts_itself_is_found(
    client: Client, worker: Redis, field: str, value: str, what: str
) -> None:
    job = client.submit(prompt="?")
    worker.hset(keys.record(job.id), field, value)
    assert any(what in found.what for found in client.verify()[1] if found.job_id == job.id)


@pytest.mark.holds(
    "docs/alerts.md#keyeoldestjobold",
    "`keye verify` says whether anything is stuck, and puts it by name",
)
@pytest.mark.holds(
    "docs/operations.md#is-any-job-stuck-lost-or-in-two-places",
    "QUEUED without a message, and nobody will publish one",
    "What a living worker puts right within two leases does not count.",
)
def test_job_that_nobody_will_ever_run_is_found(client: Client, worker: Redis) -> None:
    unpublished, lost, expiring, healthy = (client.submit(prompt="?") for _ in range(4))
    worker.zrem(keys.queued("normal"), unpublished.id, lost.id)
    worker.delete(message_list(Priority.NORMAL))
    worker.zadd(keys.queued("normal"), {lost.id: time.time() - 500})
    worker.expire(keys.record(expiring.id), 100)
    found = irregularities(client)
    assert found.keys() == {unpublished.id, lost.id, expiring.id}
    assert "nobody will publish" in found[unpublished.id]
    assert "message is lost" in found[lost.id]
    assert healthy.id not in found


def test_job_of_a_worker_that_died_and_was_never_missed_is_found(client: Client, worker: Redis) -> None:
    job = client.submit(prompt="?")
    claim(worker, job)
    worker.zadd(keys.LEASES, {job.id: time.time() - 61})
    assert "is any worker alive?" in irregularities(client)[job.id]


def test_entries_without_a_job_are_found(client: Client, worker: Redis) -> None:
    worker.zadd(keys.LEASES, {"gone-1": 1})
    worker.zadd(keys.DEADLINES, {"gone-2": 1})
    assert irregularities(client).keys() == {"gone-1", "gone-2"}


def test_messages_that_name_no_job_are_found_and_those_of_other_apps_are_not(client: Client, worker: Redis) -> None:
    job = client.submit(prompt="?")
    (ours,) = worker.lrange(message_list(Priority.NORMAL), 0, -1)
    worker.delete(message_list(Priority.NORMAL))
    worker.hset(UNACKED, mapping={"ours": json.dumps([json.loads(ours), "", QUEUE]), "theirs": '[{}, "", "mails"]'})
    ledger, found = client.verify()
    assert (found, ledger.messages) == ([], {job.id})
    worker.lpush(message_list(Priority.LOW), '{"headers": {}}', "no JSON")
    (what,) = irregularities(client).items()
    assert what[0] == "-"
    assert "names no job or cannot be read" in what[1]
    assert "Workers put it into quarantine (keye dead list --messages)" in what[1]


def test_failed_job_must_be_a_dead_letter_and_no_other(client: Client, worker: Redis) -> None:
    failed, cancelled = client.submit(prompt="?"), client.submit(prompt="?")
    lease = claim(worker, failed)
    Settlement(worker, 3600, 9000).settle(lease, failure(lease))
    cancelled.cancel()
    worker.zrem(keys.DEAD_LETTERS, failed.id)
    worker.zadd(keys.DEAD_LETTERS, {cancelled.id: 1})
    worker.zrem(keys.unheard("normal"), cancelled.id)
    found = {(found.job_id, found.what) for found in client.verify()[1]}
    assert found == {
        (failed.id, "FAILED, and no dead letter"),
        (cancelled.id, "CANCELLED, and a dead letter"),
        (cancelled.id, "CANCELLED, and its record never expires"),
    }


@pytest.mark.holds("docs/operations.md#is-any-job-stuck-lost-or-in-two-places", "ends with 9 if there is any")
def test_keye_verify_prints_what_is_wrong_and_exits_with_9(client: Client, worker: Redis, redis_url: str) -> None:
    job = client.submit(prompt="?")
    told = CliRunner().invoke(app, ["verify", "--redis-url", redis_url])
    assert (told.exit_code, told.stdout) == (ExitCode.OK, "")
    assert "1 jobs (1 QUEUED), 0 irregularities" in told.stderr
    worker.hset(keys.record(job.id), "state", "RUNNING")
    told = CliRunner().invoke(app, ["verify", "--json", "--redis-url", redis_url])
    assert told.exit_code == ExitCode.IRREGULAR == 9
    assert {json.loads(line)["job_id"] for line in told.stdout.splitlines()} == {job.id}
