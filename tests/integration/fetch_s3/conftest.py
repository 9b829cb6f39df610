"""An S3 server with one object in it, and what a worker reads it with."""

from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import boto3
import pytest

from keye.config.settings import Settings
from keye.worker.media.fetch import s3
from keye.worker.media.job_media import MediaCache, MediaLimits

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client
from tests.integration.fetch_s3.road import CONTENT, Road


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")


@pytest.fixture(autouse=True)
def no_clients() -> None:
    """A worker keeps a client for each endpoint, and a port may come back with one made without credentials."""
    s3._make_client.cache_clear()


@pytest.fixture
def store(s3_endpoint: str) -> "S3Client":
    """A client of the server, which has the bucket `media` with one object."""
    client = boto3.session.Session().client("s3", endpoint_url=s3_endpoint)
    client.create_bucket(Bucket="media")
    client.put_object(Bucket="media", Key="a folder/photo+1?.jpg", Body=CONTENT)
    return client


@pytest.fixture
def road(s3_endpoint: str) -> Iterator[Road]:
    with Road(s3_endpoint) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def limits(road: Road) -> MediaLimits:
    return MediaLimits.of(
        Settings(s3_endpoint_url=road.url, fetch_timeout_seconds=5, max_image_bytes=2**25, max_video_bytes=2**20)
    )


@pytest.fixture
def media_cache(tmp_path: Path) -> MediaCache:
    return MediaCache(tmp_path / "cache", 2**26)
