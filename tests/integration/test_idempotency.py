"""A job sent again under its key: the same one, a new one where that failed and it is asked for, or a conflict."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from pydantic import SecretStr
from redis import Redis
from typer.testing import CliRunner

from keye.config import keys
from keye.config.codes import ErrorCode, JobState
from keye.config.faults import JobFailed
from keye.config.topology import QUEUE
from keye.config.wire import seal
from keye.producer import AnalysisJob, Client, IdempotencyConflict, InvalidJob, Settings
from keye.producer.cli import app
from keye.producer.shell import ExitCode
from keye.producer.transport import Transport
from keye.worker.leases.claims import AlreadySettled, QueuedJob
from keye.worker.leases.job_lease import LeaseStore
from tests.integration.conftest import Pair
from tests.support.sides import RedisWorker

ASKED: dict[str, Any] = {"prompt": "?", "idempotency_key": "k"}
NORMAL = f"{QUEUE}\x06\x163"
WITHOUT_ANSWER = (ErrorCode.MEDIA_CORRUPT, ErrorCode.CANCELLED, ErrorCode.DEADLINE_EXCEEDED)


@pytest.mark.holds("docs/collect-many-results.md#after-a-restart", "what had been sent before is not sent twice")
def test_the_same_key_is_the_same_job_or_a_conflict(pair: Pair) -> None:
    first = pair.client.submit(prompt="?", idempotency_key="k")
    assert pair.client.submit(prompt="?", idempotency_key="k").id == first.id
    # Who asks again does so within a trace of his own.
    traced = pair.client.submit(prompt="?", idempotency_key="k", traceparent=f"00-{'4b' * 16}-{'0f' * 8}-01")
    assert traced.id == first.id
    with pytest.raises(IdempotencyConflict):
        pair.client.submit(prompt="!", idempotency_key="k")


@pytest.mark.holds(
    "docs/producers.md#from-python",
    "returns the first job, whatever became of it",
    "queues it anew where that one ended without an answer",
)
@pytest.mark.parametrize("code", WITHOUT_ANSWER)
def test_key_of_a_job_without_an_answer_is_taken_over_by_who_asks_for_that(pair: Pair, code: ErrorCode) -> None:
    first = pair.client.submit(**ASKED)
    assert pair.client.submit(**ASKED, retry_failed=True).id == first.id, "it waits"
    pair.worker.start(first)
    assert pair.client.submit(**ASKED, retry_failed=True).id == first.id, "it runs"
    pair.worker.fail(first, code)
    assert pair.client.submit(**ASKED).id == first.id
    with pytest.raises(IdempotencyConflict):
        pair.client.submit(prompt="!", idempotency_key="k", retry_failed=True)
    second = pair.client.submit(**ASKED, retry_failed=True)
    assert second.id != first.id
    assert (first.state.is_final, second.state) == (True, JobState.QUEUED)
    with pytest.raises(JobFailed, match=code):
        first.result(timeout=5)
    assert {pair.client.submit(**ASKED, retry_failed=again).id for again in (False, True)} == {second.id}
    pair.worker.answer(second, "yes")
    assert pair.client.submit(**ASKED, retry_failed=True).id == second.id, "it was answered"


def test_many_jobs_are_sent_again_where_they_failed_and_the_others_found(pair: Pair) -> None:
    asked = [{"prompt": "?", "idempotency_key": str(number)} for number in range(4)]
    first = pair.client.submit_many(asked)
    pair.worker.fail(first[1], ErrorCode.INTERNAL)
    pair.worker.answer(first[2], "yes")
    again = pair.client.submit_many([*asked, asked[1], {"prompt": ""}], retry_failed=True)
    old = [job.id for job in first]
    assert [job.id for job in again[:4]] == [old[0], again[4].id, old[2], old[3]]
    assert again[4].id not in old
    assert isinstance(again[5], InvalidJob)


def test_key_whose_job_is_gone_is_free_for_who_asks_for_that(pair: Pair) -> None:
    first = pair.client.submit(**ASKED)
    pair.worker.forget(first)
    assert pair.client.submit(**ASKED).id == first.id
    assert pair.client.submit(**ASKED, retry_failed=True).id != first.id


@pytest.mark.holds("docs/producers.md#from-python", "of several who ask at once one queues it, and all get that one")
def test_of_all_who_take_a_key_over_at_once_one_does(client: Client, redis: Redis) -> None:
    first = client.submit(**ASKED)
    RedisWorker(redis).fail(first, ErrorCode.INTERNAL)
    redis.delete(NORMAL)
    with ThreadPoolExecutor(16) as threads:
        jobs = set(threads.map(lambda _: client.submit(**ASKED, retry_failed=True).id, range(64)))
    assert len(jobs - {first.id}) == len(jobs) == 1
    assert redis.llen(NORMAL) == 1


def test_taking_over_is_sent_again_and_done_once_even_if_the_job_failed_meanwhile(redis: Redis, redis_url: str) -> None:
    transport = Transport(Settings(redis_url=SecretStr(redis_url)))
    first, sealed = (seal(AnalysisJob(**ASKED)) for _ in range(2))
    with Client(redis_url) as client:
        RedisWorker(redis).fail(client.job(transport.submit(first)), ErrorCode.INTERNAL)
        assert [transport.submit(sealed, retry_failed=True) for _ in range(2)] == [sealed.job_id] * 2
        RedisWorker(redis).fail(client.job(sealed.job_id), ErrorCode.INTERNAL)
    assert transport.submit(sealed, retry_failed=True) == sealed.job_id
    assert redis.hget(keys.record(sealed.job_id), "state") == JobState.FAILED
    assert redis.llen(NORMAL) == 2
    transport.close()


@pytest.mark.holds("docs/producers.md#from-python", "The old job can be read as before.")
def test_what_becomes_of_the_old_job_does_not_free_the_key(client: Client, redis: Redis) -> None:
    old = [client.submit(prompt="?", idempotency_key=key) for key in ("purged", "requeued")]
    for job in old:
        RedisWorker(redis).fail(job, ErrorCode.INTERNAL)
    new = [client.submit(prompt="?", idempotency_key=key, retry_failed=True) for key in ("purged", "requeued")]
    assert [redis.ttl(keys.idempotency(key)) for key in ("purged", "requeued")] == [-1, -1]
    assert [letter.job_id for letter in client.dead_letters.select()] == [job.id for job in old]
    client.dead_letters.purge(client.dead_letters.find(old[0].id))
    client.dead_letters.requeue(client.dead_letters.find(old[1].id))
    for job, key in zip(new, ("purged", "requeued"), strict=True):
        assert client.submit(prompt="?", idempotency_key=key).id == job.id
        assert redis.ttl(keys.idempotency(key)) == -1
    assert client.verify()[1] == []


def test_cancelled_job_whose_message_waits_gives_its_key_away_for_good(client: Client, redis: Redis) -> None:
    first = client.submit(**ASKED)
    first.cancel()
    second = client.submit(**ASKED, retry_failed=True)
    store = LeaseStore(redis, lease_seconds=30)
    assert isinstance(store.claim(QueuedJob(first.id, {}), "takes its message"), AlreadySettled)
    assert redis.ttl(keys.record(first.id)) > 0
    assert redis.ttl(keys.idempotency("k")) == -1
    assert client.submit(**ASKED).id == second.id


def test_the_shell_has_it_too(client: Client, redis: Redis, redis_url: str) -> None:
    def keye(*arguments: str, text: str | None = None) -> str:
        told = CliRunner().invoke(app, arguments, input=text, env={"KEYE_REDIS_URL": redis_url})
        assert told.exit_code == ExitCode.OK, told.output
        return told.stdout.strip()

    ways: list[Callable[..., str]] = [
        lambda *more: keye("submit", "?", "--idempotency-key", "k", *more),
        lambda *more: keye("submit", "--job", "-", *more, text=json.dumps(ASKED)),
        lambda *more: keye("submit-many", "-", *more, text=json.dumps(ASKED)),
    ]
    first = ways[0]()
    for way in ways:
        RedisWorker(redis).fail(client.job(first), ErrorCode.INTERNAL)
        assert way() == first
        second = way("--retry-failed")
        assert second != first
        first = second
    typed = json.dumps({**ASKED, "retry_failed": True})
    odd = CliRunner().invoke(app, ["submit", "--job", "-"], input=typed, env={"KEYE_REDIS_URL": redis_url})
    assert (odd.exit_code, "retry_failed: is no field here" in odd.stderr) == (ExitCode.INVALID, True)
