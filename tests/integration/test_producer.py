"""The producer against a real server: what is queued, what is refused, and what is left behind."""

import asyncio
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from pydantic import SecretStr
from redis import Redis

from keye.config import keys
from keye.config.job import ImagePart
from keye.config.wire import seal
from keye.producer import (
    AnalysisJob,
    AsyncClient,
    Client,
    IdempotencyConflict,
    InvalidJob,
    Job,
    JobState,
    QueueUnavailable,
    Settings,
)
from keye.producer.dead_letters import DeadLetter
from keye.producer.transport import Transport
from tests.support.worker_side import JOB

QUEUES = {"high": "keye.jobs", "normal": "keye.jobs\x06\x163", "low": "keye.jobs\x06\x166"}


class TestSubmit:
    @pytest.mark.holds(
        "docs/architecture.md#a-jobs-way",
        "flowchart TB subgraph producers [Your",
    )
    def test_a_submitted_job_is_queued_once_under_its_id(self, client: Client, redis: Redis) -> None:
        job = client.submit(JOB)
        (message,) = redis.lrange(QUEUES["normal"], 0, -1)
        assert json.loads(message)["headers"]["id"] == job.id
        assert job.state is JobState.QUEUED

    @pytest.mark.holds("docs/design.md#decisions", "A producer writes Celery's message itself")
    @pytest.mark.parametrize("priority", QUEUES)
    def test_each_priority_waits_in_its_own_list(self, client: Client, redis: Redis, priority: str) -> None:
        client.submit(prompt="?", priority=priority)
        assert {name: redis.llen(queue) for name, queue in QUEUES.items() if redis.llen(queue)} == {priority: 1}

    def test_signed_urls_stay_out_of_the_message_headers(self, client: Client, redis: Redis) -> None:
        client.submit(prompt="?", media=["https://b.example/k.png?X-Amz-Signature=secret"])
        (message,) = redis.lrange(QUEUES["normal"], 0, -1)
        assert "secret" not in message  # the body is base64

    @pytest.mark.holds("docs/producers.md#from-any-language", "`idempotency_key` is looked up by the Python client")
    def test_the_same_key_and_job_is_queued_only_once(self, client: Client, redis: Redis) -> None:
        first = client.submit(prompt="?", idempotency_key="order 7")
        again = client.submit(prompt="?", idempotency_key="order 7")
        assert first.id == again.id
        assert redis.llen(QUEUES["normal"]) == 1

    @pytest.mark.holds(
        "docs/producers.md#what-can-be-raised", "the key was used for a job that asks for something else"
    )
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

    @pytest.mark.holds("docs/producers.md#from-python", "Threads share it")
    def test_threads_share_a_client(self, client: Client, redis: Redis) -> None:
        with ThreadPoolExecutor(16) as threads:
            ids = list(threads.map(lambda n: client.submit(prompt=str(n)).id, range(200)))
        messages = redis.lrange(QUEUES["normal"], 0, -1)
        assert sorted(json.loads(message)["headers"]["id"] for message in messages) == sorted(ids)

    @pytest.mark.holds(
        "docs/reliability.md#promises",
        "Our clients write record and",
    )
    @pytest.mark.holds("docs/producers.md#how-do-i-submit-jobs", "the first two in one atomic move")
    @pytest.mark.holds("docs/design.md#decisions", "with the same payload, in one atomic script")
    def test_a_job_that_cannot_be_published_leaves_nothing_behind(self, client: Client, redis: Redis) -> None:
        redis.set(QUEUES["normal"], "not a list")
        with pytest.raises(QueueUnavailable, match="could not queue the job"):
            client.submit(prompt="?", idempotency_key="k")
        assert redis.keys(f"{keys.PREFIX}*") == []

    @pytest.mark.holds(
        "docs/scaling.md#how-many-gpus-that-is",
        "A Redis that is full",
    )
    @pytest.mark.holds(
        "docs/operations.md#redis-is-full-what-must-i-do",
        "producers are told (`QueueUnavailable`, exit code 7 of `keye`)",
    )
    def test_a_full_redis_is_told_from_an_absent_one(self, client: Client, redis: Redis) -> None:
        redis.config_set("maxmemory", 1)
        try:
            with pytest.raises(QueueUnavailable, match=r"It is full: .*KEYE_RESULT_TTL_SECONDS"):
                client.submit(JOB)
        finally:
            redis.config_set("maxmemory", 0)

    def test_a_queued_job_is_no_business_of_the_reaper(self, client: Client, redis: Redis) -> None:
        job = client.submit(JOB)
        assert redis.zcard(keys.LEASES) == 0
        assert redis.zrange(keys.queued("normal"), 0, -1) == [job.id]

    def test_a_submission_whose_answer_was_lost_is_sent_again_and_queued_once(
        self, redis: Redis, redis_url: str
    ) -> None:
        sealed, transport = seal(JOB), Transport(Settings(redis_url=SecretStr(redis_url)))
        assert [transport.submit(sealed) for _ in range(2)] == [sealed.job_id] * 2
        assert redis.llen(QUEUES["normal"]) == 1
        transport.redis.close()

    def test_a_deadline_is_known_from_the_start_and_forgotten_with_the_job(self, client: Client, redis: Redis) -> None:
        job = client.submit(prompt="?", deadline_seconds=60)
        assert redis.zscore(keys.DEADLINES, job.id) == pytest.approx(time.time() + 60, abs=5)
        job.cancel()
        assert not redis.exists(keys.DEADLINES, keys.queued("normal"))

    @pytest.mark.holds(
        "docs/producers.md#from-any-language",
        "`submitted_at` and `deadline_at` stay as you wrote them",
        "Jobs of the Python client and of `keye` count from Redis' own",
    )
    @pytest.mark.parametrize("hours", [-5, 5])
    @pytest.mark.parametrize("way", ["submit", "submit_many", "asyncio", "again"])
    def test_times_are_those_of_the_servers_clock_however_wrong_ours_is(
        self, client: Client, redis: Redis, redis_url: str, monkeypatch: pytest.MonkeyPatch, hours: float, way: str
    ) -> None:
        true_time = time.time
        monkeypatch.setattr("time.time", lambda: true_time() + hours * 3600)
        job = JOB.model_copy(update={"deadline_seconds": 60.0})
        match way:
            case "submit":
                job_id = client.submit(job).id
            case "submit_many":
                (sent,) = client.submit_many([job])
                assert isinstance(sent, Job)
                job_id = sent.id
            case "asyncio":

                async def submit() -> str:
                    async with AsyncClient(redis_url) as asking:
                        return (await asking.submit(job)).id

                job_id = asyncio.run(submit())
            case _:
                job_id = client.dead_letters.requeue(DeadLetter("dead", 0, seal(job).record)).id
        submitted_at, deadline_at = map(float, redis.hmget(keys.record(job_id), "submitted_at", "deadline_at"))
        assert submitted_at == pytest.approx(true_time(), abs=5)
        assert deadline_at == pytest.approx(submitted_at + 60)
        assert redis.zscore(keys.DEADLINES, job_id) == deadline_at
        sealed = json.loads(redis.hget(keys.record(job_id), "sealed"))
        assert sealed["submitted_at"] == pytest.approx(true_time() + hours * 3600, abs=5), "as it was sent"

    @pytest.mark.holds(
        "docs/producers.md#how-much-a-job-may-hold", "A producer has no tokenizer and counts a token for each digit"
    )
    @pytest.mark.parametrize(
        "fields",
        [
            {"prompt": "two words", "max_new_tokens": 99},
            {"prompt": "10 7.", "max_new_tokens": 97},
            {"prompt": "?", "media": ["s3://b/1.png", "s3://b/2.mp4"], "max_new_tokens": 98},
            {"messages": {"role": "user", "content": ["one", " two", ImagePart(uri="s3://b/1")]}, "max_new_tokens": 98},
        ],
        ids=["words", "digits", "media", "chat"],
    )
    def test_more_tokens_than_the_workers_hold_are_refused_with_the_numbers(
        self, client: Client, redis: Redis, fields: dict[str, Any]
    ) -> None:
        redis.set(keys.CONTEXT, 100)
        asked = {**fields}
        new = asked.pop("max_new_tokens")
        with pytest.raises(InvalidJob, match=rf"job: at least 101 tokens, {new} of them new .* workers hold 100 for"):
            client.submit(**asked, generation={"max_new_tokens": new}, idempotency_key="k")
        assert redis.keys(f"{keys.PREFIX}*") == [keys.CONTEXT]
        client.submit(**asked, generation={"max_new_tokens": new - 1}, idempotency_key="k")

    def test_an_absent_redis_is_a_typed_error_that_names_the_setting(self) -> None:
        with Client("redis://127.0.0.1:9/0") as client, pytest.raises(QueueUnavailable, match="KEYE_REDIS_URL"):
            client.submit(JOB)

    @pytest.mark.holds("docs/producers.md#from-python", "so do the children of a web server that forks")
    def test_a_forked_child_submits_through_its_parents_client(self, redis: Redis, redis_url: str) -> None:
        program = (
            "import os, sys\n"
            "from keye import Client\n"
            "client = Client(sys.argv[1])\n"
            "client.submit(prompt='parent')\n"
            "child = os.fork()\n"
            "client.submit(prompt='child' if child == 0 else 'parent')\n"
            "if child: sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        )
        subprocess.run([sys.executable, "-c", program, redis_url], check=True, timeout=30)
        assert redis.llen(QUEUES["normal"]) == 3

    def test_nothing_is_imported_by_the_first_use_of_a_client(self, redis_url: str) -> None:
        """A child that is forked while a thread of its parent imports something cannot import it any more."""
        program = (
            "import sys\n"
            "from keye import Client\n"
            "client = Client(sys.argv[1])\n"
            "before = {*sys.modules}\n"
            "job = client.submit(prompt='?')\n"
            "job.cancel(), job.state, job.progress, list(client.results([job])), list(job.events())\n"
            "list(client.watch('0', timeout=0)), client.submit_many([{'prompt': '?'}])\n"
            "print(*sorted({*sys.modules} - before))\n"
        )
        command = [sys.executable, "-c", program, redis_url]
        assert subprocess.run(command, check=True, timeout=60, capture_output=True, text=True).stdout == "\n"


class TestSubmitMany:
    def test_all_jobs_are_queued_in_order(self, client: Client, redis: Redis) -> None:
        jobs = client.submit_many(AnalysisJob(prompt=str(n)) for n in range(600))
        messages = reversed(redis.lrange(QUEUES["normal"], 0, -1))
        assert [json.loads(message)["headers"]["id"] for message in messages] == [job.id for job in jobs]
        assert {job.state for job in jobs} == {JobState.QUEUED}

    @pytest.mark.holds("docs/producers.md#from-python", "It returns for each its job or the error")
    def test_each_job_that_is_refused_has_its_own_error_and_costs_no_other(self, client: Client, redis: Redis) -> None:
        redis.set(keys.CONTEXT, 4096)
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
        assert "at least 5001 tokens" in str(too_long)
        with pytest.raises(InvalidJob, match=r"1 fault: questions\.1: at least 6000 tokens, 1024 of them new"):
            client.submit(questions=["?", "word " * 4976, "!"])
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
