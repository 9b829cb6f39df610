"""Large media held in memory are uploaded by `submit`, to a real S3 server, and workers read them back."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
import pytest
from PIL import Image
from pydantic import SecretStr
from redis import Redis

from keye.config import keys
from keye.config.settings import Settings
from keye.config.wire import open_sealed
from keye.producer import Client, ImagePart, Job, UploadFailed
from keye.worker.media.job_media import MediaCache, MediaLimits, fetch

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

PHOTO = b"\xff\xd8\xff" + os.urandom(3 * 2**20)


@pytest.fixture
def store(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> "S3Client":
    for name, value in {
        "ACCESS_KEY_ID": "testing",
        "SECRET_ACCESS_KEY": "secret",
        "DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    client = boto3.session.Session().client("s3", endpoint_url=s3_endpoint)
    client.create_bucket(Bucket="uploads")
    return client


@pytest.fixture
def client(redis_url: str, s3_endpoint: str, store: "S3Client") -> Iterator[Client]:
    settings = Settings(
        redis_url=SecretStr(redis_url), s3_endpoint_url=s3_endpoint, upload_prefix="s3://uploads/from backend/"
    )
    with Client(settings) as client:
        yield client


def media_of(job: Job, redis: Redis) -> tuple[ImagePart, ...]:
    sealed = redis.hget(keys.record(job.id), "sealed")
    return open_sealed(json.loads(sealed)).job.media


def test_large_media_are_uploaded_and_read_back_by_workers(
    client: Client, redis: Redis, s3_endpoint: str, tmp_path: Path
) -> None:
    noise = Image.frombytes("RGB", (900, 800), os.urandom(3 * 900 * 800))
    job = client.submit(prompt="?", media=[PHOTO, noise, b"\x89PNG\r\n\x1a\n small"])
    photo, picture, small = media_of(job, redis)
    assert photo.uri.startswith("s3://uploads/from backend/")
    assert photo.uri.endswith(".jpg")
    assert picture.uri.endswith(".png")
    assert small.uri.startswith("data:image/png;base64,")
    limits = MediaLimits.of(Settings(s3_endpoint_url=s3_endpoint))
    fetched_photo, fetched_picture = fetch([photo, picture], limits, MediaCache(tmp_path, 2**24))
    with fetched_photo as file:
        assert file.read() == PHOTO
    with fetched_picture as file:
        assert Image.open(file).tobytes() == noise.tobytes()


def test_pictures_that_a_job_has_no_room_for_are_uploaded(client: Client, redis: Redis) -> None:
    photo = b"\xff\xd8\xff" + bytes(2**20 - 3)
    small = b"\xff\xd8\xff small"
    job = client.submit(prompt="?", media=[*[photo] * 10, small])
    assert [part.uri.partition(":")[0] for part in media_of(job, redis)] == ["data"] * 8 + ["s3"] * 2 + ["data"]


def test_same_bytes_are_the_same_job_under_one_idempotency_key(client: Client) -> None:
    jobs = [client.submit(prompt="?", media=[PHOTO], idempotency_key="once") for _ in range(2)]
    assert jobs[0].id == jobs[1].id


def test_failed_upload_is_told_and_nothing_is_queued(client: Client, store: "S3Client", redis: Redis) -> None:
    for found in store.list_objects_v2(Bucket="uploads").get("Contents", []):
        store.delete_object(Bucket="uploads", Key=found["Key"])
    store.delete_bucket(Bucket="uploads")
    with pytest.raises(UploadFailed, match=r"media\.0 .* s3://uploads/from backend/ \(NoSuchBucket\)"):
        client.submit(prompt="?", media=[PHOTO])
    assert not redis.keys()
