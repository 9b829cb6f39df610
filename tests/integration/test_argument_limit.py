"""A real server that takes no large arguments: the job pays for it, and nobody takes it for an outage."""

import base64
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from kombu import Connection
from pydantic import SecretStr
from redis import Redis

from keye.config import keys
from keye.config.codes import ErrorCode, JobState, Stage
from keye.config.connection import LOWEST_LIMIT_BYTES, ArgumentTooLarge, Patience, check_arguments, connect
from keye.config.event import JobEnded, StageStarted, TextGenerated
from keye.config.outcome import (
    OUTCOME,
    JobFailure,
    JobResult,
    PartialText,
)
from keye.config.settings import Settings
from keye.config.topology import QUEUE, UNACKED, message
from keye.config.wire import seal
from keye.producer import AnalysisJob, Client, InvalidJob, Job, QueueUnavailable
from keye.producer.transport import Transport
from keye.worker.leases.claims import Claimed
from keye.worker.leases.job_lease import LeaseStore
from keye.worker.results.event_writer import AttemptEvents, EventWriter
from keye.worker.results.outbox import Outbox, Spool, Verdict
from keye.worker.results.settlement import OutcomeTooLarge, Settlement
from keye.worker.tasks.celery_app import build_app
from keye.worker.tasks.fault import explain, failure_of
from tests.support.conditions import eventually
from tests.support.leased_jobs import DEAD_LETTER_TTL, TTL, a_failure, a_job, an_answer, claim, events, record
from tests.support.redis_login import log_in

SETTINGS = ("proto-max-bulk-len", "client-query-buffer-limit")
ANSWER = {"channel": "answer", "num_tokens": 1}
PICTURE = b"\x89PNG\r\n\x1a\n" + os.urandom(900_000)


@contextmanager
def set_to(redis: Redis, **settings: int) -> Iterator[None]:
    named = {name.replace("_", "-"): value for name, value in settings.items()}
    usual = {name: redis.config_get(name)[name] for name in named}
    for name, value in named.items():
        redis.config_set(name, value)
    try:
        yield
    finally:
        for name, value in usual.items():
            redis.config_set(name, value)


@pytest.fixture(params=SETTINGS)
def setting(redis: Redis, request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of the one that is as low as it can be."""
    with set_to(redis, **{request.param: LOWEST_LIMIT_BYTES}):
        yield request.param


@pytest.fixture
def connection(redis_url: str) -> Iterator[Redis]:
    with connect(redis_url) as connection:
        yield connection


@pytest.fixture
def store(connection: Redis) -> LeaseStore:
    return LeaseStore(connection, lease_seconds=30)


@pytest.fixture
def settlement(connection: Redis) -> Settlement:
    return Settlement(connection, TTL, DEAD_LETTER_TTL)


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path)


@pytest.fixture
def outbox(settlement: Settlement, spool: Spool) -> Outbox:
    return Outbox(settlement, spool, Patience())


def a_result(lease: Claimed, num_chars: int) -> JobResult:
    """It is cut off at the most tokens."""
    result = an_answer(lease)
    usage = result.usage.model_copy(update={"completion_tokens": 131072})
    cut_off = {"answer": "", "raw_text": "x" * num_chars, "finish_reason": "length", "usage": usage}
    return result.model_copy(update=cut_off)


def outcome(redis: Redis, job_id: str) -> JobResult | JobFailure:
    return OUTCOME.validate_json(record(redis, job_id)["outcome"])


class TestSubmit:
    def test_large_job_is_refused_with_size_limit_and_setting(self, client: Client, redis: Redis, setting: str) -> None:
        with pytest.raises(InvalidJob, match=rf"1,6\d\d,\d\d\d bytes .* takes 1,048,576 \({setting}\)"):
            client.submit(prompt="?", media=[PICTURE], idempotency_key="k")
        assert not redis.keys()

    def test_large_job_costs_its_neighbours_nothing(self, client: Client, redis: Redis, setting: str) -> None:
        small = {"prompt": "?"}
        first, large, second, larger = client.submit_many(
            [small, {"prompt": "?", "media": [PICTURE]}, small, {"prompt": "?", "media": [PICTURE, PICTURE]}]
        )
        assert isinstance(first, Job)
        assert isinstance(second, Job)
        assert (first.state, second.state) == (JobState.QUEUED, JobState.QUEUED)
        assert [type(refusal) for refusal in (large, larger)] == [InvalidJob] * 2
        assert setting in str(larger)

    def test_none_but_large_jobs_are_all_refused(self, client: Client, redis: Redis, setting: str) -> None:
        answers = client.submit_many([{"prompt": "?", "media": [PICTURE]}] * 3)
        assert [type(answer) for answer in answers] == [InvalidJob] * 3

    def test_largest_message_that_is_queued_can_be_taken(self, redis: Redis, redis_url: str, setting: str) -> None:
        """Celery keeps what it has taken, with more around it and in a transaction, until it is acknowledged."""
        settings = Settings(redis_url=SecretStr(redis_url), lease_seconds=3600)
        transport = Transport(settings)
        sealed = seal(AnalysisJob(prompt="x"))
        around = len(message(sealed.job_id, sealed.model_dump_json(), sealed.job.priority))
        # Three characters are four of base64; a time of submission may have a few digits more than another.
        num_chars = (LOWEST_LIMIT_BYTES - 1024 - around) // 4 * 3
        transport.submit(seal(AnalysisJob(prompt="x" * (num_chars - 30))))
        with pytest.raises(InvalidJob, match=setting):
            transport.submit(seal(AnalysisJob(prompt="x" * (num_chars + 30))))
        transport.redis.close()

        options = build_app(settings).conf.broker_transport_options
        with Connection(redis_url, transport_options=options) as broker:
            taken = broker.default_channel.basic_get(QUEUE)
            assert redis.hlen(UNACKED) == 1
            taken.ack()

    def test_server_as_it_comes_takes_it(self, client: Client) -> None:
        assert client.submit(prompt="?", media=[PICTURE] * 5).state is JobState.QUEUED

    def test_server_that_may_not_be_asked_is_taken_to_be_as_it_comes(self, redis: Redis, redis_url: str) -> None:
        redis.execute_command("ACL", "SETUSER", "shy", "on", ">pw", "~*", "&*", "+@all", "-config")
        try:
            with Client(log_in(redis_url, "shy:pw")) as shy:
                assert shy.submit(prompt="?", media=[PICTURE]).state is JobState.QUEUED
        finally:
            redis.execute_command("ACL", "DELUSER", "shy")

    def test_ordinary_job_is_queued_without_asking(self, client: Client, redis: Redis) -> None:
        def num_asked() -> int:
            return redis.info("commandstats").get("cmdstat_config|get", {"calls": 0})["calls"]

        before = num_asked()
        client.submit(prompt="?", media=[PICTURE[:500_000]])
        assert num_asked() == before

    def test_server_that_is_away_is_an_outage_also_for_a_large_job(self) -> None:
        with Client("redis://127.0.0.1:9/0") as client:
            large = {"prompt": "?", "media": [PICTURE]}
            assert [type(answer) for answer in client.submit_many([large, large])] == [QueueUnavailable] * 2
            with pytest.raises(QueueUnavailable):
                client.submit(**large)


class TestSettle:
    @pytest.mark.holds(
        "docs/producers.md#how-much-a-job-may-hold", "An answer that is larger than what Redis takes ends"
    )
    def test_answer_that_is_too_large_ends_its_job_as_failed(
        self, store: LeaseStore, outbox: Outbox, redis: Redis, setting: str
    ) -> None:
        sealed = a_job(metadata={"order": 7})
        lease = claim(store, sealed)
        told = rf"131072 tokens .*2,\d+,\d+ bytes .* takes 1,048,576 \({setting}\)"
        with pytest.raises(OutcomeTooLarge, match=told) as raised:
            outbox.settle(lease, a_result(lease, 2**21))
        assert record(redis, lease.job_id)["state"] == JobState.RUNNING
        # As the analyst does with any outcome that cannot be written.
        assert outbox.settle(lease, failure_of(explain(raised.value), Stage.GENERATE, lease, sealed.job.metadata))
        told = outcome(redis, lease.job_id)
        assert isinstance(told, JobFailure)
        assert (told.code, told.state, told.metadata) == (ErrorCode.INVALID_JOB, JobState.FAILED, {"order": 7})
        assert setting in told.message

    def test_cancelled_job_stays_cancelled_without_what_it_had_written(
        self, store: LeaseStore, settlement: Settlement, redis: Redis, setting: str
    ) -> None:
        lease = claim(store, a_job())
        written = PartialText(answer="", reasoning=None, raw_text="猫" * 2**20, completion_tokens=2**20)
        update = {"code": ErrorCode.CANCELLED, "partial": written, "metadata": {"order": 7}}
        assert settlement.settle(lease, a_failure(lease, "as asked").model_copy(update=update))
        told = outcome(redis, lease.job_id)
        assert isinstance(told, JobFailure)
        assert (told.state, told.partial, told.metadata) == (JobState.CANCELLED, None, {"order": 7})
        assert told.message.startswith("as asked (Left out: ")
        assert record(redis, lease.job_id)["state"] == JobState.CANCELLED

    @pytest.mark.parametrize("what", ["message", "metadata"])
    def test_failure_that_is_large_for_another_reason_is_told_too(
        self, store: LeaseStore, settlement: Settlement, redis: Redis, setting: str, what: str
    ) -> None:
        """By a producer of another language: of 100,000 faults in a job, or with metadata beyond the limit."""
        lease = claim(store, a_job())
        large = "x" * 2**21 if what == "message" else {"large": "x" * 2**21}
        assert settlement.settle(lease, a_failure(lease, "early").model_copy(update={what: large}))
        told = outcome(redis, lease.job_id)
        assert isinstance(told, JobFailure)
        assert (told.code, told.metadata) == (ErrorCode.INTERNAL, {})
        assert len(told.message) < 5000

    @pytest.mark.parametrize("name", SETTINGS)
    def test_answer_that_is_too_large_for_the_server_after_an_outage_is_not_kept_on_disk(
        self, store: LeaseStore, outbox: Outbox, spool: Spool, redis: Redis, name: str
    ) -> None:
        lease = claim(store, a_job())
        with set_to(redis, **{name: 2**28}, maxmemory=1), ThreadPoolExecutor(1) as threads:
            settling = threads.submit(outbox.settle, lease, a_result(lease, 2**21))
            eventually(lambda: list(spool.waiting()))
            redis.config_set(name, LOWEST_LIMIT_BYTES)
            # Full until then: a try that was on its way before, under the higher limit, must not be written.
            with pytest.raises(OutcomeTooLarge):
                settling.result(30)
        assert list(spool.waiting()) == []

    def test_celery_is_told_of_an_answer_that_fits_and_of_one_that_does_not(
        self, store: LeaseStore, settlement: Settlement, redis: Redis, setting: str
    ) -> None:
        lease = claim(store, a_job())
        settlement.tell_celery("fits", a_result(lease, 900_000))
        settlement.tell_celery("does-not", a_result(lease, 2 * 2**20))
        assert '"SUCCESS"' in redis.get("celery-task-meta-fits")
        assert setting in redis.get("celery-task-meta-does-not")

    def test_events_that_are_too_large_are_left_out_and_the_others_told_with_the_end(
        self, store: LeaseStore, settlement: Settlement, redis: Redis, setting: str
    ) -> None:
        lease = claim(store, a_job())
        said = AttemptEvents(EventWriter(redis), lease)
        for offset, size in enumerate((400_000, 2**21, 400_000, 400_000)):
            said.tell(TextGenerated, may_wait=True, text="x" * size, offset=offset, **ANSWER)
        assert settlement.settle(lease, a_failure(lease), said.unwritten)
        _, *texts, end = events(redis, lease.job_id)
        assert [text.offset for text in texts if isinstance(text, TextGenerated)] == [0, 2, 3]
        assert isinstance(end, JobEnded)


class TestEvents:
    def test_event_that_is_too_large_does_not_silence_those_after_it(
        self, store: LeaseStore, redis: Redis, setting: str
    ) -> None:
        lease = claim(store, a_job())
        said = AttemptEvents(EventWriter(redis), lease)
        assert said.tell(TextGenerated, text="x" * 2**21, offset=0, **ANSWER)
        assert said.tell(TextGenerated, text="end", offset=2**21, **ANSWER)
        (told,) = [event for event in events(redis, lease.job_id) if isinstance(event, TextGenerated)]
        assert (told.text, told.offset) == ("end", 2**21)

    def test_events_that_are_large_together_are_all_told(self, store: LeaseStore, redis: Redis, setting: str) -> None:
        lease = claim(store, a_job())
        said = AttemptEvents(EventWriter(redis), lease)
        said.tell(StageStarted, may_wait=True, stage=Stage.GENERATE)
        for offset in range(4):
            said.tell(TextGenerated, may_wait=True, text="x" * 400_000, offset=offset, **ANSWER)
        said.flush()
        assert said.unwritten == []
        told = events(redis, lease.job_id)
        assert [type(event) for event in told] == [StageStarted] * 2 + [TextGenerated] * 4


class TestDeliver:
    def test_outcome_on_disk_that_is_too_large_ends_its_job_and_holds_up_no_other(
        self, store: LeaseStore, outbox: Outbox, spool: Spool, redis: Redis, setting: str
    ) -> None:
        leases = [claim(store, a_job()) for _ in range(5)]
        for number, lease in enumerate(leases):
            spool.keep(Verdict(lease=lease, outcome=a_result(lease, 2**21 if number % 2 else 9)))
        outbox.deliver()
        assert list(spool.waiting()) == []
        states = [record(redis, lease.job_id)["state"] for lease in leases]
        assert states == ["SUCCEEDED", "FAILED", "SUCCEEDED", "FAILED", "SUCCEEDED"]
        told = outcome(redis, leases[1].job_id)
        assert isinstance(told, JobFailure)
        assert (told.code, told.attempts, told.metadata) == (ErrorCode.INVALID_JOB, 1, {"order": 7})
        assert setting in told.message
        assert redis.zcard(keys.DEAD_LETTERS) == 2


@pytest.mark.parametrize("size", [0, LOWEST_LIMIT_BYTES - 1024])
def test_what_every_server_takes_is_not_asked_for(size: int) -> None:
    with Redis(port=9) as nobody:
        check_arguments(nobody, ("x" * size, 7, base64.b64encode(b"bytes").decode()))


def test_bytes_count_not_characters(redis: Redis, setting: str) -> None:
    with pytest.raises(ArgumentTooLarge, match=r"1,201,024 bytes"):
        check_arguments(redis, ("猫" * 400_000,))
