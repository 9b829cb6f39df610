"""Objects of S3 and its like, by way of the cache: in parts side by side, each taken up where it broke off."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import wait
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import cache, partial
from http import HTTPStatus
from typing import TYPE_CHECKING, BinaryIO, NotRequired, TypedDict

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
)

from keye.config.aws import load_aws_names
from keye.worker.media.faults import MediumFault, forbidden, not_found, unreachable
from keye.worker.media.fetch.lack import raise_lack
from keye.worker.media.fetch.media_cache import MediaCache
from keye.worker.media.fetch.transfer import Transfer, read_retry_after
from keye.worker.media.limits import MediaLimits, check_size
from keye.worker.media.side_by_side import do_side_by_side

if TYPE_CHECKING:
    from botocore.response import StreamingBody
    from types_boto3_s3 import S3Client


class _Asked(TypedDict):
    """The object, as the store's calls take it. A version only where the caller asked for one."""

    Bucket: str
    Key: str
    VersionId: NotRequired[str]


# How often an object may be replaced under our reading before we leave it to its writer.
_MAX_TRIES = 3

# InvalidArgument: no versionId looks like that.
_NOT_FOUND = {"NoSuchKey", "NoSuchBucket", "NoSuchVersion", "InvalidBucketName", "InvalidArgument", "404"}
_PASSING = {"SlowDown", "RequestTimeout", "RequestTimeTooSkewed", "TooManyRequests", "InternalError"}

_MAX_CONNECTIONS = 8

_PART_BYTES = 8 * 2**20
_CHUNK_BYTES = 64 * 2**10

# How often one part may break off; refused connections and answers such as 503 botocore tries again by itself.
_MAX_BREAKS = 4


class _ObjectChanged(Exception):
    """The object was replaced since its `_ObjectVersion` was found."""


def fetch_object(uri: str, limits: MediaLimits, transfer: Transfer, media_cache: MediaCache) -> BinaryIO:
    """Open `s3://bucket/key` (or `...?versionId=...`), downloaded unless the cache holds this very version of it."""
    asked = _parse(uri)
    if limits.s3_buckets and asked["Bucket"] not in limits.s3_buckets:
        raise forbidden("is in a bucket this worker may not read (KEYE_S3_BUCKETS).")
    try:
        client = _client(limits.s3_endpoint_url, transfer.timeout_seconds)
        for _ in range(_MAX_TRIES):
            found = _find_version(client, asked)
            check_size(found.num_bytes, transfer.max_bytes)
            identity = (limits.s3_endpoint_url or "s3", uri, found.etag, str(found.num_bytes))
            download = partial(found.download, transfer.go_on)
            with suppress(_ObjectChanged):
                return media_cache.open(identity, found.num_bytes, download, transfer.go_on)
    except (ClientError, BotoCoreError) as error:
        raise_lack(error)
        raise _fault_of(error) from None
    raise unreachable(f"was replaced {_MAX_TRIES} times while it was read. Send it when it rests.")


def _parse(uri: str) -> _Asked:
    bucket, _, key = uri[len("s3://") :].partition("/")
    key, _, version_id = key.partition("?versionId=")
    if uri[:5].lower() != "s3://" or not bucket or not key:
        raise not_found("names no object. Write s3://bucket/key.")
    asked: _Asked = {"Bucket": bucket, "Key": key}
    if version_id:
        asked["VersionId"] = version_id
    return asked


def _find_version(client: "S3Client", asked: _Asked) -> "_ObjectVersion":
    try:
        head = client.head_object(**asked)
    except ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] in (HTTPStatus.BAD_REQUEST, HTTPStatus.FORBIDDEN):
            # An answer to HEAD has no body, and so no reason. Whoever asks for a byte is told.
            client.get_object(Range="bytes=0-0", **asked)["Body"].close()
        raise
    return _ObjectVersion(client, asked, head["ETag"], head["ContentLength"])


def _fault_of(error: ClientError | BotoCoreError) -> MediumFault:
    if isinstance(error, ParamValidationError):
        return not_found("is no valid bucket and key.")
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return forbidden("this worker has no S3 credentials. Set AWS_ACCESS_KEY_ID or a role.")
    if isinstance(error, BotoCoreError):
        # The class alone: botocore's own sentence holds the whole URL.
        return unreachable(f"the store did not answer or broke off ({type(error).__name__}).")
    reason = error.response.get("Error", {}).get("Code", "unknown")
    answer = error.response.get("ResponseMetadata", {})
    status = answer.get("HTTPStatusCode", 0)
    if reason in _PASSING or status >= 500 or status == 429:
        retry_after = read_retry_after(answer.get("HTTPHeaders", {}).get("retry-after"))
        return unreachable(f"the store answered {status} {reason}.", retry_after_seconds=retry_after)
    if reason in _NOT_FOUND or status == 404:
        return not_found("the store has no such bucket, object or version.")
    return forbidden(f"the store refused ({status} {reason}). Check the worker's credentials.")


_making_client = threading.Lock()


def _client(endpoint_url: str | None, timeout_seconds: float) -> "S3Client":
    # Clients are safe to share between threads, making one is not.
    with _making_client:
        return _make_client(endpoint_url, timeout_seconds)


@cache
def _make_client(endpoint_url: str | None, timeout_seconds: float) -> "S3Client":
    config = Config(
        connect_timeout=min(5.0, timeout_seconds),
        read_timeout=timeout_seconds,
        # Adaptive: all jobs of this process slow down together when the store asks for it.
        retries={"mode": "adaptive", "total_max_attempts": 3},
        max_pool_connections=256,  # kept for the next; a download may open more
        # Other stores than AWS rarely have a host name for each bucket.
        s3={"addressing_style": "path" if endpoint_url else "auto"},
    )
    load_aws_names()
    try:
        client = boto3.session.Session().client("s3", endpoint_url=endpoint_url, config=config)
        raise_lack()  # it would not have found its credentials, and be kept
        return client
    except ValueError:
        raise unreachable("this worker's AWS_ENDPOINT_URL is no URL. Its operator has to correct it.") from None


@dataclass(frozen=True, slots=True)
class _ObjectVersion:
    """What a store has of the object that was asked for; `etag` pins it, whether or not a version was."""

    client: "S3Client"
    asked: _Asked
    etag: str
    num_bytes: int

    def download(self, check: Callable[[], None], handle: int) -> None:
        """Write the whole object to the file of this handle.

        Raises `_ObjectChanged`, what `check` raises, or botocore's own errors.
        """
        starts = range(0, self.num_bytes, _PART_BYTES)
        calls = [partial(self._fetch, handle, start, min(start + _PART_BYTES, self.num_bytes)) for start in starts]
        # Waited for in any case: they write to the handle.
        do_side_by_side(calls, _MAX_CONNECTIONS, check, wait)

    def _fetch(self, handle: int, start: int, end: int, go_on: Callable[[], None]) -> None:
        num_breaks = 0
        while start < end:
            try:
                with closing(self._ask(start, end)) as body:
                    for chunk in body.iter_chunks(_CHUNK_BYTES):
                        num_written = os.pwrite(handle, chunk, start)
                        start += num_written
                        go_on()
                        if num_written < len(chunk):
                            break  # the disk is full, and says so at the next write
            except (HTTPClientError, IncompleteReadError):
                num_breaks += 1
                if num_breaks == _MAX_BREAKS:
                    raise

    def _ask(self, start: int, end: int) -> "StreamingBody":
        try:
            response = self.client.get_object(IfMatch=self.etag, Range=f"bytes={start}-{end - 1}", **self.asked)
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] == HTTPStatus.PRECONDITION_FAILED:
                raise _ObjectChanged from None
            raise
        if response["ETag"] != self.etag or response["ContentLength"] != end - start:
            # It went on with another version, or sends all of it: a store that knows neither If-Match nor Range.
            response["Body"].close()
            raise _ObjectChanged
        return response["Body"]
