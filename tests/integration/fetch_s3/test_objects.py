"""Objects are fetched from an S3 server over real HTTP, or refused with the code that fits."""

import hashlib
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from typing import TYPE_CHECKING
from urllib.request import Request, urlopen

import pytest

from keye.config.codes import ErrorCode
from keye.config.job import ImagePart
from keye.worker.media.job_media import MediaCache, MediaLimits, fetch

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client
from tests.integration.fetch_s3.road import CONTENT, LARGE, PHOTO, Road
from tests.support.fetching import fault_of, fetch_one


@pytest.mark.usefixtures("store")
def test_object_arrives_whole_whatever_signs_its_key_holds(limits: MediaLimits, media_cache: MediaCache) -> None:
    assert fetch_one(PHOTO, limits, media_cache) == CONTENT


def test_version_asked_for_is_the_one_fetched(store: "S3Client", limits: MediaLimits, media_cache: MediaCache) -> None:
    store.put_bucket_versioning(Bucket="media", VersioningConfiguration={"Status": "Enabled"})
    first = store.put_object(Bucket="media", Key="photo.jpg", Body=b"first")["VersionId"]
    store.put_object(Bucket="media", Key="photo.jpg", Body=b"second")
    assert fetch_one("s3://media/photo.jpg", limits, media_cache) == b"second"
    assert fetch_one(f"s3://media/photo.jpg?versionId={first}", limits, media_cache) == b"first"
    for absent in ("no-version-at-all", "00000000-0000-4000-8000-000000000000"):
        fault = fault_of(f"s3://media/photo.jpg?versionId={absent}", limits, media_cache)
        assert fault.code is ErrorCode.MEDIA_NOT_FOUND


@pytest.mark.holds(
    "docs/operations.md#what-lies-in-the-cache-folder-and-may-i-delete-it",
    "Objects of S3 are kept by bucket, key and ETag",
)
@pytest.mark.usefixtures("store")
def test_ten_questions_download_an_object_once_even_at_once(
    road: Road, limits: MediaLimits, media_cache: MediaCache
) -> None:
    with ThreadPoolExecutor(5) as pool:
        answers = list(pool.map(lambda _: fetch_one(PHOTO, limits, media_cache), range(10)))
    assert set(answers) == {CONTENT}
    assert road.requests.count("GET") == 1


@pytest.mark.holds(
    "docs/operations.md#what-lies-in-the-cache-folder-and-may-i-delete-it",
    "each job still asks the store whether it may read the object and which version is there",
)
def test_object_that_changed_is_downloaded_anew(
    store: "S3Client", limits: MediaLimits, media_cache: MediaCache
) -> None:
    assert fetch_one(PHOTO, limits, media_cache) == CONTENT
    store.put_object(Bucket="media", Key="a folder/photo+1?.jpg", Body=CONTENT[::-1])
    assert fetch_one(PHOTO, limits, media_cache) == CONTENT[::-1]


def test_large_object_comes_in_parts(
    store: "S3Client", road: Road, limits: MediaLimits, media_cache: MediaCache
) -> None:
    store.put_object(Bucket="media", Key="large.mp4", Body=LARGE)
    assert fetch_one("s3://media/large.mp4", limits, media_cache) == LARGE
    assert road.requests == ["HEAD", "GET", "GET", "GET"]


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize(
    "uri", ["s3://media/absent.jpg", "s3://absent-bucket/photo.jpg", "s3://media", "s3://media/", "s3://b@d/key"]
)
def test_what_the_store_does_not_have_is_not_found(limits: MediaLimits, media_cache: MediaCache, uri: str) -> None:
    assert fault_of(uri, limits, media_cache).code is ErrorCode.MEDIA_NOT_FOUND


@pytest.mark.holds(
    "docs/operations.md#which-media-does-a-worker-read",
    "from any bucket or from those in `KEYE_S3_BUCKETS`",
)
@pytest.mark.usefixtures("store")
def test_bucket_that_is_not_allowed_is_not_even_asked(road: Road, limits: MediaLimits, media_cache: MediaCache) -> None:
    fault = fault_of(PHOTO, replace(limits, s3_buckets=("receipts", "clips")), media_cache)
    assert fault.code is ErrorCode.MEDIA_FORBIDDEN
    assert "KEYE_S3_BUCKETS" in fault.message
    assert road.requests == []
    assert fetch_one(PHOTO, replace(limits, s3_buckets=("receipts", "media")), media_cache) == CONTENT


@pytest.mark.usefixtures("store")
def test_large_object_is_refused_before_it_is_downloaded(
    road: Road, limits: MediaLimits, media_cache: MediaCache
) -> None:
    fault = fault_of(PHOTO, replace(limits, max_image_bytes=1000), media_cache)
    assert fault.code is ErrorCode.MEDIA_TOO_LARGE
    assert "10,240 bytes, the limit is 1,000" in fault.message
    assert road.requests == ["HEAD"]


def test_empty_object_is_corrupt(store: "S3Client", limits: MediaLimits, media_cache: MediaCache) -> None:
    store.put_object(Bucket="media", Key="empty.jpg", Body=b"")
    assert fault_of("s3://media/empty.jpg", limits, media_cache).code is ErrorCode.MEDIA_CORRUPT


@pytest.mark.holds("docs/operations.md#which-media-does-a-worker-read", "fetched side by side, eight at a time")
def test_media_of_one_job_come_side_by_side_and_in_order(
    store: "S3Client", road: Road, limits: MediaLimits, media_cache: MediaCache
) -> None:
    contents = [os.urandom(1000) for _ in range(8)]
    for number, content in enumerate(contents):
        store.put_object(Bucket="media", Key=f"{number}.jpg", Body=content)
    road.troubles = deque([Barrier(len(contents), timeout=20).wait])
    fetched = fetch([ImagePart(uri=f"s3://media/{number}.jpg") for number in range(8)], limits, media_cache)
    assert [medium.file.read() for medium in fetched] == contents
    for file in fetched:
        file.close()


def test_worker_without_credentials_says_so(
    limits: MediaLimits, media_cache: MediaCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    fault = fault_of(PHOTO, limits, media_cache)
    assert fault.code is ErrorCode.MEDIA_FORBIDDEN
    assert "AWS_ACCESS_KEY_ID" in fault.message


@pytest.mark.usefixtures("store")
def test_store_that_refuses_access_is_forbidden(limits: MediaLimits, media_cache: MediaCache, s3_endpoint: str) -> None:
    with checked_access(s3_endpoint):
        fault = fault_of(PHOTO, limits, media_cache)
    assert fault.code is ErrorCode.MEDIA_FORBIDDEN
    assert "403 InvalidAccessKeyId" in fault.message


@contextmanager
def checked_access(s3_endpoint: str) -> Iterator[None]:
    """moto lets the first so many requests in unchecked; our credentials are of nobody it knows."""
    address, plain = f"{s3_endpoint}/moto-api/reset-auth", {"Content-Type": "text/plain"}
    urlopen(Request(address, data=b"0", headers=plain)).close()
    yield
    urlopen(Request(address, data=b"inf", headers=plain)).close()


@pytest.mark.holds(
    "docs/operations.md#was-that-really-what-the-model-saw", "Objects of S3, `https://` and `data:` have it always"
)
def test_an_object_is_told_by_its_digest_its_etag_and_its_version(
    store: "S3Client", limits: MediaLimits, media_cache: MediaCache, tmp_path: Path
) -> None:
    store.put_bucket_versioning(Bucket="media", VersioningConfiguration={"Status": "Enabled"})
    for content in (b"first", b"second"):
        put = store.put_object(Bucket="media", Key="photo.jpg", Body=content)
        told = (len(content), hashlib.sha256(content).hexdigest(), put["ETag"], put["VersionId"])
        # Downloaded, of the cache, and by a worker that has no room to keep it.
        for cache in (media_cache, media_cache, MediaCache(tmp_path / "small", 0)):
            (medium,) = fetch([ImagePart(uri="s3://media/photo.jpg")], limits, cache)
            medium.close()
            seen = medium.identity
            assert (seen.num_bytes, seen.sha256, seen.etag, seen.version_id) == told
