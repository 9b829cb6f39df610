"""What callers and operators keep secret stays out of logs, events, outcomes and everything else but the job itself."""

import base64
import io
import time
import uuid
from contextlib import suppress
from pathlib import Path

import boto3
import pytest
from celery import Celery
from PIL import Image
from redis import Redis

from keye.config import keys
from keye.config.codes import ErrorCode, JobState
from keye.config.topology import ANALYZE_TASK, QUEUE
from keye.producer import Client, ImagePart, JobFailed
from keye.worker.demo.local_worker import LocalWorker

# One word that all secrets of this test hold, spelt so that no encoding on the way changes it.
SECRET = "Hush7Hush"

# What each reference comes to.
REFERENCES = {
    f"s3://media/photo.png?versionId={SECRET}": ErrorCode.MEDIA_NOT_FOUND,
    f"s3://media/absent.png?X-Amz-Signature={SECRET}": ErrorCode.MEDIA_NOT_FOUND,
    f"s3://other-bucket/photo.png?X-Amz-Credential={SECRET}": ErrorCode.MEDIA_FORBIDDEN,
    f"https://127.0.0.1/photo.png?token={SECRET}#{SECRET}": ErrorCode.MEDIA_FORBIDDEN,
    f"https://{SECRET}:{SECRET}@127.0.0.1/photo.png": ErrorCode.MEDIA_FORBIDDEN,
    f"https://[::1/photo.png?token={SECRET}": ErrorCode.MEDIA_NOT_FOUND,
    f"data:image/png;base64,{SECRET}": ErrorCode.MEDIA_CORRUPT,
    f"data:image/png,{SECRET}": ErrorCode.MEDIA_UNSUPPORTED,
}


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN"):
        monkeypatch.setenv(f"AWS_{name}", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.usefixtures("credentials")
def test_secrets_are_found_in_the_job_alone(
    form: str, redis_url: str, redis: Redis, s3_endpoint: str, tmp_path: Path
) -> None:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "PNG")
    store = boto3.session.Session().client("s3", endpoint_url=s3_endpoint)
    with suppress(store.exceptions.BucketAlreadyOwnedByYou):
        store.create_bucket(Bucket="media")
    store.put_object(Bucket="media", Key="photo.png", Body=file.getvalue())
    inline = f"data:image/png;charset={SECRET};base64,{base64.b64encode(file.getvalue()).decode()}"
    log = tmp_path / "worker.log"
    settings = {
        "KEYE_S3_ENDPOINT_URL": s3_endpoint,
        "KEYE_S3_BUCKETS": "media",
        "KEYE_ALLOW_HTTPS": "true",
        "KEYE_LOG_FORMAT": form,
        "KEYE_LOG_LEVEL": "DEBUG",
    }
    with LocalWorker(redis_url, log, settings), Client(redis_url) as client:
        for uri, code in REFERENCES.items():
            job = client.submit(prompt="What is in the image?", media=[ImagePart(uri=uri)], max_attempts=1)
            with pytest.raises(JobFailed) as failed:
                job.result(timeout=60)
            assert failed.value.code is code, uri
            assert SECRET not in str(failed.value)
        answered = client.submit(prompt="What is in the image?", media=[ImagePart(uri="s3://media/photo.png")])
        assert SECRET not in answered.result(timeout=60).model_dump_json()
        assert client.submit(prompt="What is in the image?", media=[ImagePart(uri=inline)]).result(timeout=60).answer
        send_unreadable_job(redis_url)
        # A job without a record is a job once a worker has claimed it.
        while not redis.exists(keys.record("unreadable")):
            time.sleep(0.02)
        for told in client.find("unreadable").events(timeout=60):
            assert SECRET not in told.model_dump_json()
        assert client.find("unreadable").state is JobState.FAILED
    assert SECRET in str(redis.hget(keys.record("unreadable"), "sealed")), "or else there was nothing to find"
    assert "Traceback" not in log.read_text()
    assert SECRET not in log.read_text()
    assert len(redis.keys("*job:*")) > 2 * len(REFERENCES)
    for key in redis.scan_iter():
        assert SECRET not in key
        assert SECRET not in everything_but_the_job(redis, key), key


def send_unreadable_job(redis_url: str) -> None:
    """As a producer of another language would, that has its own idea of a URI."""
    job = {"prompt": "?", "media": [{"type": "image", "uri": f"ftp://host/a.png?{SECRET}", "token": SECRET}]}
    sealed = {"schema_version": 1, "job_id": "unreadable", "submitted_at": 0.0, "job": job}
    with Celery(broker=redis_url, set_as_current=False) as app:
        app.send_task(
            ANALYZE_TASK, kwargs={"sealed": sealed}, kwargsrepr="{}", task_id=str(uuid.uuid4()), queue=QUEUE, priority=3
        )


def everything_but_the_job(redis: Redis, key: str) -> str:
    match redis.type(key):
        case "hash":
            return str({name: value for name, value in redis.hgetall(key).items() if name != "sealed"})
        case "stream":
            return str(redis.xrange(key))
        case "string":
            return str(redis.get(key))
        case "list":
            return str(redis.lrange(key, 0, -1))
        case "zset":
            return str(redis.zrange(key, 0, -1))
        case _:
            return str(redis.smembers(key))
