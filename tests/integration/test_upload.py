"""Large media held in memory are uploaded by `submit`, to a real S3 server, and workers read them back."""

import base64
import json
import os
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, ClassVar

import boto3
import pytest
from PIL import Image
from pydantic import SecretStr
from redis import Redis

from keye.config import keys
from keye.config.settings import Settings
from keye.config.wire import open_sealed
from keye.producer import Client, ImagePart, Job, UploadFailed, VideoPart
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


def media_of(job: Job, redis: Redis) -> tuple[ImagePart | VideoPart, ...]:
    sealed = redis.hget(keys.record(job.id), "sealed")
    return open_sealed(json.loads(sealed)).job.all_media()


def test_large_media_are_uploaded_and_read_back_by_workers(
    client: Client, redis: Redis, s3_endpoint: str, tmp_path: Path
) -> None:
    noise = Image.frombytes("RGB", (900, 800), os.urandom(3 * 900 * 800))
    data = f"data:image/png;base64,{base64.b64encode(PHOTO).decode()}"
    openai = {"type": "image_url", "image_url": {"url": data}}
    job = client.submit(prompt="?", media=[PHOTO, noise, b"\x89PNG\r\n\x1a\n small", data, openai])
    photo, picture, small, *inline = media_of(job, redis)
    assert inline == [photo, photo]
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


@pytest.mark.holds("docs/producers.md#what-a-medium-may-be", "Up to 1 MiB of content travels inside the job")
def test_pictures_that_a_job_has_no_room_for_are_uploaded(client: Client, redis: Redis) -> None:
    photo = b"\xff\xd8\xff" + bytes(2**20 - 3)
    small = b"\xff\xd8\xff small"
    job = client.submit(prompt="?", media=[*[photo] * 10, small])
    assert [part.uri.partition(":")[0] for part in media_of(job, redis)] == ["data"] * 8 + ["s3"] * 2 + ["data"]


@pytest.mark.holds("docs/producers.md#what-a-medium-may-be", "What is larger, a `data:` URI too, is uploaded")
def test_large_files_of_this_machine_are_uploaded_and_read_back_by_workers(
    client: Client, redis: Redis, s3_endpoint: str, tmp_path: Path
) -> None:
    # More than boto3 sends in one piece.
    content = b"\0\0\0\x18ftypisom" + os.urandom(9 * 2**20)
    (tmp_path / "clip").write_bytes(content)
    with (tmp_path / "clip").open("rb") as file:
        media = [tmp_path / "clip", {"type": "video", "uri": tmp_path / "clip", "fps": 1}, file]
        chat = [{"role": "user", "content": ["Which is it?", *media]}]
        jobs = client.submit(prompt="?", media=media), client.submit(messages=chat)
        assert not file.closed
    uri = media_of(jobs[0], redis)[0].uri
    assert uri.endswith(".mp4")
    as_asked = (VideoPart(uri=uri), VideoPart(uri=uri, fps=1), VideoPart(uri=uri))
    assert [media_of(job, redis) for job in jobs] == [as_asked] * 2
    limits = MediaLimits.of(Settings(s3_endpoint_url=s3_endpoint))
    (fetched,) = fetch([as_asked[0]], limits, MediaCache(tmp_path / "cache", 2**24))
    with fetched as file:
        assert file.read() == content


class ChangingStore(BaseHTTPRequestHandler):
    """Takes whatever is put into it, and then writes into a file."""

    file: Path
    put: ClassVar[list[str]] = []

    def do_PUT(self) -> None:
        if self.rfile.read(int(self.headers["Content-Length"])):
            self.put.append(self.path)
        with self.file.open("ab") as file:
            file.write(b"more")
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.mark.holds("docs/producers.md#what-a-medium-may-be", "A file that changes meanwhile is refused.")
def test_file_that_changes_before_it_is_uploaded_is_told_and_never_put(
    redis_url: str, redis: Redis, store: "S3Client", tmp_path: Path
) -> None:
    photo, growing = tmp_path / "photo.jpg", tmp_path / "growing.jpg"
    photo.write_bytes(PHOTO)
    growing.write_bytes(PHOTO + b"one")
    ChangingStore.file, ChangingStore.put = growing, []
    with HTTPServer(("127.0.0.1", 0), ChangingStore) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        settings = Settings(
            redis_url=SecretStr(redis_url),
            s3_endpoint_url=f"http://127.0.0.1:{server.server_port}",
            upload_prefix="s3://uploads",
        )
        try:
            with Client(settings) as client, pytest.raises(UploadFailed, match=r"^media\.1 changed while it was upl"):
                client.submit(prompt="?", media=[photo, growing])
        finally:
            server.shutdown()
            thread.join()
    assert len(ChangingStore.put) == 1
    assert not redis.keys()


def test_same_bytes_are_the_same_job_under_one_idempotency_key(client: Client) -> None:
    jobs = [client.submit(prompt="?", media=[PHOTO], idempotency_key="once") for _ in range(2)]
    assert jobs[0].id == jobs[1].id


@pytest.mark.holds("docs/producers.md#what-can-be-raised", "a medium could not be put where")
def test_failed_upload_is_told_and_nothing_is_queued(client: Client, store: "S3Client", redis: Redis) -> None:
    for found in store.list_objects_v2(Bucket="uploads").get("Contents", []):
        store.delete_object(Bucket="uploads", Key=found["Key"])
    store.delete_bucket(Bucket="uploads")
    with pytest.raises(UploadFailed, match=r"media\.0 .* s3://uploads/from backend/ \(NoSuchBucket\)"):
        client.submit(prompt="?", media=[PHOTO])
    assert not redis.keys()
