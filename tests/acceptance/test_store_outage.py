"""A media store that is away for longer than three attempts take: a real worker, its real pauses, a real socket."""

from threading import Thread

import pytest
from redis import Redis

from keye.config import keys
from keye.config.codes import ErrorCode, JobState
from keye.producer import Client, JobFailed
from tests.acceptance.conftest import ECHO, SlowStore, Start
from tests.support.conditions import eventually
from tests.support.ports import free_port


def test_jobs_outlast_it_unless_they_say_how_often_they_are_tried(start: Start, redis: Redis, client: Client) -> None:
    port = free_port()
    asked = {"prompt": "?", "media": ["s3://photos/7.png"]}
    jobs = [client.submit(**asked) for _ in range(12)]
    once, thrice = client.submit(**asked, max_attempts=1), client.submit(**asked, max_attempts=3)
    start(*ECHO, KEYE_S3_ENDPOINT_URL=f"http://127.0.0.1:{port}", KEYE_LEASE_SECONDS="3").wait_until_ready()
    for job, num_attempts in ((once, 1), (thrice, 3)):
        with pytest.raises(JobFailed) as failed:
            job.result(timeout=60)
        assert (failed.value.code, failed.value.failure.attempts) == (ErrorCode.MEDIA_UNREACHABLE, num_attempts)

    # Each has failed as often as it was dead-lettered for before.
    eventually(lambda: all(redis.hexists(keys.record(job.id), "attempt:3") for job in jobs), within_seconds=60)
    assert {job.state for job in jobs} <= {JobState.QUEUED, JobState.RUNNING}
    with SlowStore(port) as store:
        store.may_go_on.set()
        serving = Thread(target=store.serve_forever, args=(0.01,))
        serving.start()
        try:
            assert {job.result(timeout=120).answer for job in jobs} == {"?"}
        finally:
            store.shutdown()
            serving.join()
    assert {letter.job_id for letter in client.dead_letters.select()} == {once.id, thrice.id}
