"""Errors where they were not raised: in the parent of a process pool, in Celery's results, in the place of a job."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from celery import Celery
from celery.result import AsyncResult
from redis import Redis

import keye
from keye import (
    Client,
    ErrorCode,
    InvalidJob,
    InvalidSettings,
    JobFailed,
    KeyeError,
    Refusal,
)
from keye.config.codes import Stage
from keye.config.outcome import JobFailure
from keye.config.topology import result_key
from keye.worker.results.settlement import result_message

FAILURE = JobFailure(
    job_id="7", code=ErrorCode.MEDIA_CORRUPT, message="a.jpg: broke.", stage=Stage.DECODE, retryable=False, attempts=1
)


# A backend's: what its children raise, told as JSON.
POOL = """
import json, sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from keye import Client, JobFailed, JobNotEnded

URL = sys.argv[1]

def wait_in_vain():
    Client(URL).submit(prompt="?").result(timeout=0.01)

def use_a_key_twice():
    client = Client(URL)
    client.submit(prompt="?", idempotency_key="order 7")
    client.submit(prompt="!", idempotency_key="order 7")

def read_a_cancelled_job():
    job = Client(URL).submit(prompt="?", metadata={"order": 7})
    job.cancel()
    job.result(timeout=10)

def find_nothing():
    Client(URL).find("nobodys")

def ask_nothing():
    Client(URL).submit(prompt="")

def reach_nobody():
    Client("redis://127.0.0.1:9/0").submit(prompt="?")

if __name__ == "__main__":
    told = []
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        for work in (wait_in_vain, use_a_key_twice, read_a_cancelled_job, find_nothing, ask_nothing, reach_nobody):
            try:
                pool.submit(work).result(60)
            except Exception as error:
                facts = []
                if isinstance(error, JobNotEnded):
                    facts = [error.state]
                elif isinstance(error, JobFailed):
                    facts = [error.code, error.failure.metadata]
                told.append([f"{type(error).__module__}.{type(error).__name__}", str(error), *facts])
    print(json.dumps(told))
"""


def test_what_is_raised_in_a_process_pool_is_raised_by_its_future(redis_url: str, tmp_path: Path) -> None:
    (tmp_path / "backend.py").write_text(POOL)
    ran = subprocess.run([sys.executable, tmp_path / "backend.py", redis_url], capture_output=True, timeout=100)
    assert ran.returncode == 0, ran.stderr
    not_ended, conflict, failed, unknown, invalid, unavailable = json.loads(ran.stdout)
    kinds = [told[0] for told in (not_ended, conflict, failed, unknown, invalid, unavailable)]
    names = ("JobNotEnded", "IdempotencyConflict", "JobFailed", "JobNotFound", "InvalidJob", "QueueUnavailable")
    assert kinds == [f"keye.{name}" for name in names]
    assert not_ended[1].endswith("is QUEUED after 0.01 s of waiting. Is a worker running?")
    assert not_ended[2] == "QUEUED"
    assert "'order 7' belongs to a job that asks for something else" in conflict[1]
    assert failed[1:] == [
        "CANCELLED: The caller cancelled the job while it was queued.",
        "CANCELLED",
        {"order": 7},
    ]
    assert "There is no job 'nobodys'" in unknown[1]
    assert "fault" in invalid[1]
    assert "KEYE_REDIS_URL" in unavailable[1]


def read_by_celery(redis: Redis, redis_url: str, written: str) -> BaseException:
    redis.set(result_key(FAILURE.job_id), written)
    app = Celery(backend=redis_url, set_as_current=False)
    with pytest.raises(Exception, match="broke") as caught:
        AsyncResult(FAILURE.job_id, app=app).get(timeout=10)
    return caught.value


def test_celery_raises_todays_failure_as_the_public_error(redis: Redis, redis_url: str) -> None:
    written = result_message(FAILURE.job_id, FAILURE, FAILURE.model_dump_json())
    assert json.loads(written)["result"]["exc_module"] == "keye"
    failed = read_by_celery(redis, redis_url, written)
    assert isinstance(failed, keye.JobFailed)
    assert failed.failure == FAILURE


@pytest.mark.parametrize("module", ["config.outcome", "keye.config.outcome"])
def test_celery_raises_a_failure_of_an_earlier_release_by_its_name(redis: Redis, redis_url: str, module: str) -> None:
    message = json.loads(result_message(FAILURE.job_id, FAILURE, FAILURE.model_dump_json()))
    message["result"]["exc_module"] = module
    failed = read_by_celery(redis, redis_url, json.dumps(message))
    assert type(failed).__name__ == "JobFailed"
    code, sentence, failure = failed.args
    assert (code, sentence) == (FAILURE.code, FAILURE.message)
    assert JobFailure.model_validate_json(failure) == FAILURE


# As docs/celery.md has it.
WITHOUT_KEYE = """
import json, sys
from celery import Celery

task = Celery("client", broker=sys.argv[1], backend=sys.argv[1]).AsyncResult(sys.argv[2])
try:
    task.get(timeout=10)
except Exception as failed:
    if type(failed).__name__ != "JobFailed":
        raise
    code, sentence, failure = failed.args
    print(code, sentence, json.loads(failure)["stage"])
assert not [name for name in sys.modules if name.split(".")[0] == "keye"]
"""


def test_celery_raises_todays_failure_by_its_name_where_keye_is_not_known(redis: Redis, redis_url: str) -> None:
    redis.set(result_key(FAILURE.job_id), result_message(FAILURE.job_id, FAILURE, FAILURE.model_dump_json()))
    command = [sys.executable, "-c", WITHOUT_KEYE, redis_url, FAILURE.job_id]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout == "MEDIA_CORRUPT a.jpg: broke. decode\n"


def test_a_job_that_was_not_accepted_is_asked_like_any_other(redis_url: str) -> None:
    told = []
    with Client(redis_url) as client:
        jobs = client.submit_many([{"prompt": "?"}, {"prompt": ""}, {"prompt": "!"}])
        for job in jobs:
            try:
                job.cancel()
                job.result(timeout=10)
            except KeyeError as error:
                told.append(type(error))
    assert told == [JobFailed, InvalidJob, JobFailed]
    assert [isinstance(job, Refusal) for job in jobs] == [False, True, False]
    assert [job.id is None for job in jobs] == [False, True, False]


def test_an_odd_url_and_odd_settings_are_under_the_root_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyeError, match="KEYE_REDIS_URL") as caught:
        Client("redis://127.0.0.1:a port/0")
    assert isinstance(caught.value, InvalidSettings)
    monkeypatch.setenv("KEYE_LEASE_SECONDS", "soon")
    with pytest.raises(KeyeError, match="KEYE_LEASE_SECONDS") as caught:
        Client("redis://127.0.0.1:6379/0")
    assert isinstance(caught.value, InvalidSettings)
