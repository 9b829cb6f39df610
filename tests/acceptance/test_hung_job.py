"""A job that hangs in its thread, where nothing can interrupt it. The worker's engine echoes; all else is real."""

import pytest

from keye.config import keys
from keye.config.codes import ErrorCode, JobState, Stage
from keye.config.faults import JobFailed
from keye.producer import Client
from keye.worker.daemon.exit_codes import ExitCode
from tests.acceptance.conftest import Start
from tests.support.conditions import eventually

ECHO = ("celery", "-A", "tests.support.echo_worker", "worker", "--loglevel", "INFO")
INCLUDE = {"CELERY_WORKER_INCLUDE": "tests.acceptance.impatient_watch"}


@pytest.mark.holds(
    "docs/reliability.md#promises",
    "A job that hangs in",
)
@pytest.mark.holds(
    "docs/operations.md#how-long-may-a-job-take",
    "A job whose thread hangs in native code is told so",
    "lets the others finish for 5 s, gives the rest back and ends with 18",
)
@pytest.mark.holds("docs/operations.md#what-does-the-log-say", "Where a hung thread stood (`faulthandler`)")
@pytest.mark.holds("docs/operations.md#how-did-a-process-end", "A job hung in its thread beyond its time")
def test_a_hung_job_is_ended_and_its_process_too_once_its_neighbours_are_done_or_given_back(
    start: Start, client: Client
) -> None:
    worker = start(*ECHO, **INCLUDE)
    worker.wait_until_ready()
    neighbours = [client.submit(prompt=f"wait {seconds}", max_attempts=1) for seconds in (3, 600)]
    eventually(lambda: all(job.state is JobState.RUNNING for job in neighbours))
    hung = client.submit(prompt="hang", deadline_seconds=1)
    with pytest.raises(JobFailed) as told:
        hung.result(timeout=30)
    assert told.value.code is ErrorCode.DEADLINE_EXCEEDED
    assert told.value.failure.stage is Stage.PREPARE

    assert worker.exit_code() == ExitCode.JOB_HUNG
    assert "echo_worker.py" in worker.log  # where it hangs
    assert [job.state for job in neighbours] == [JobState.SUCCEEDED, JobState.QUEUED]
    heir = start(*ECHO)
    eventually(lambda: neighbours[1].state is JobState.RUNNING, within_seconds=60)
    record = worker.redis.hgetall(keys.record(neighbours[1].id))
    assert record["worker"].endswith(f":{heir.process.pid}")
    assert not any(field.startswith("attempt:") for field in record)
