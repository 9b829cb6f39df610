"""Objects of S3 and its like, by way of the cache: in parts side by side, each taken up where it broke off."""

import os
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import cache, partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict, TypeVar
from urllib.parse import unquote

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
from keye.config.bounded_s3 import bound, code_of, status_of, watched_by
from keye.config.settings import BUCKET
from keye.worker.media.faults import MediumFault, forbidden, not_found, unreachable
from keye.worker.media.fetch.fetched import Fetched, as_told
from keye.worker.media.fetch.lack import raise_lack
from keye.worker.media.fetch.media_cache import MediaCache
from keye.worker.media.fetch.transfer import Transfer, read_retry_after
from keye.worker.media.limits import MediaLimits, check_size
from keye.worker.media.side_by_side import do_side_by_side

if TYPE_CHECKING:
    from botocore.response import StreamingBody
    from types_boto3_s3 import S3Client
    from types_boto3_s3.type_defs import GetObjectOutputTypeDef

Answer = TypeVar("Answer")


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

# Of S3, in UTF-8.
_MAX_KEY_BYTES = 1024

# It goes back as If-Match, and is compared.
_ETAG = re.compile(r"[ -~]{1,1024}")


class _ObjectChanged(Exception):
    """The object was replaced since its `_ObjectVersion` was found."""


def fetch_object(uri: str, limits: MediaLimits, transfer: Transfer, media_cache: MediaCache) -> Fetched:
    """Open `s3://bucket/key` (or `...?versionId=...`), downloaded unless the cache holds this very version of it."""
    asked = _parse(uri)
    if limits.s3_buckets and asked["Bucket"] not in limits.s3_buckets:
        raise forbidden("is in a bucket this worker may not read (KEYE_S3_BUCKETS).")
    try:
        client = partial(_client, limits.s3_endpoint_url, transfer.timeout_seconds)
        for _ in range(_MAX_TRIES):
            found = _find_version(client, asked, transfer.go_on)
            check_size(found.num_bytes, transfer.max_bytes)
            identity = (limits.s3_endpoint_url or "s3", uri, found.etag, str(found.num_bytes))
            download = partial(found.download, transfer.go_on)
            with suppress(_ObjectChanged):
                fetched = media_cache.open(identity, found.num_bytes, download, transfer.go_on)
                return fetched.told(etag=as_told(found.etag), version_id=found.version_id)
    except (ClientError, BotoCoreError) as error:
        raise_lack(error)
        raise _fault_of(error) from None
    raise unreachable(f"was replaced {_MAX_TRIES} times while it was read. Send it when it rests.")


def _parse(uri: str) -> _Asked:
    bucket, _, key = uri[len("s3://") :].partition("/")
    key, _, version_id = key.partition("?versionId=")
    if uri[:5].lower() != "s3://" or not bucket or not key:
        raise not_found("names no object. Write s3://bucket/key.")
    if not re.fullmatch(BUCKET, bucket):
        raise not_found("is in no valid bucket: names have 3 to 255 letters, digits and . _ -. Write s3://bucket/key.")
    if (num_bytes := len(key.encode(errors="replace"))) > _MAX_KEY_BYTES:
        raise not_found(f"has a key of {num_bytes:,} bytes, and no key of S3 has over {_MAX_KEY_BYTES:,}. Shorten it.")
    if _leads_elsewhere(key):
        raise forbidden("has '.' or '..' between slashes in its key, which leads some stores elsewhere. Rename it.")
    asked: _Asked = {"Bucket": bucket, "Key": key}
    if version_id:
        asked["VersionId"] = version_id
    return asked


def _leads_elsewhere(key: str) -> bool:
    """Whether some server on the way may take a part of it for a step up, and out of the bucket."""
    while (plain := unquote(key).replace("\\", "/")) != key:
        key = plain
    # Servers written in Java pass over what follows a ";".
    return not {".", ".."}.isdisjoint(step.partition(";")[0] for step in key.split("/"))


def _find_version(client: "Callable[[], S3Client]", asked: _Asked, go_on: Callable[[], None]) -> "_ObjectVersion":
    try:
        head = _ask(lambda: client().head_object(**asked), go_on)
    except ClientError as error:
        if status_of(error) in (HTTPStatus.BAD_REQUEST, HTTPStatus.FORBIDDEN):
            # An answer to HEAD has no body, and so no reason. Whoever asks for a byte is told.
            _ask(lambda: client().get_object(Range="bytes=0-0", **asked), go_on)["Body"].close()
        raise
    etag, num_bytes = head.get("ETag", ""), head.get("ContentLength", -1)
    if not _ETAG.fullmatch(etag) or num_bytes < 0:
        raise _no_answer("without a usable ETag" if num_bytes >= 0 else "without a length of 0 or more")
    return _ObjectVersion(client(), asked, etag, num_bytes, as_told(head.get("VersionId")))


def _ask(call: Callable[[], Answer], go_on: Callable[[], None]) -> Answer:
    """What `call` of a client returns, unless `go_on` raises before.

    In a thread of its own: a client looks up names and credentials, connects, and sleeps before it tries again,
    which nothing ends. Then the thread ends soon after; what it reads meanwhile ends at once.
    """

    def ask(_: object) -> Answer:
        try:
            return call()
        except (ClientError, BotoCoreError, MediumFault, OSError):
            raise
        except Exception as error:
            go_on()
            # botocore takes what a store says for what S3 would say.
            raise _no_answer(f"botocore: {type(error).__name__}") from None

    with watched_by(go_on):
        (answer,) = do_side_by_side([ask], 1, go_on, _close_late)
    return answer


def _close_late(asking: "Sequence[Future[Any]]") -> None:
    def close(answer: "Future[Any]") -> None:
        if not answer.exception() and "Body" in answer.result():
            answer.result()["Body"].close()

    for answer in asking:
        answer.add_done_callback(close)


def _no_answer(how: str) -> MediumFault:
    return unreachable(f"the store answered as no S3 does ({how}). Check that KEYE_S3_ENDPOINT_URL is one.")


def _fault_of(error: ClientError | BotoCoreError) -> MediumFault:
    if isinstance(error, ParamValidationError):
        return not_found("is no valid bucket and key.")
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return forbidden("this worker has no S3 credentials. Set AWS_ACCESS_KEY_ID or a role.")
    if isinstance(error, BotoCoreError):
        # The class alone: botocore's own sentence holds the whole URL.
        return unreachable(f"the store did not answer or broke off ({type(error).__name__}).")
    reason, status = code_of(error), status_of(error)
    answered = reason if reason == str(status) else f"{status} {reason}"
    if reason in _PASSING or status >= 500 or status == 429:
        headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
        retry_after = read_retry_after(headers.get("retry-after"))
        return unreachable(f"the store answered {answered}.", retry_after_seconds=retry_after)
    if reason in _NOT_FOUND or status == 404:
        return not_found("the store has no such bucket, object or version.")
    if 300 <= status < 400:
        return forbidden(f"the store sends elsewhere ({answered}). Check its endpoint and region (AWS_DEFAULT_REGION).")
    return forbidden(f"the store refused ({answered}). Check the worker's credentials.")


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
        client = bound(boto3.session.Session().client("s3", endpoint_url=endpoint_url, config=config))
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
    version_id: str | None

    def download(self, check: Callable[[], None], handle: int) -> None:
        """Write the whole object to the file of this handle.

        Raises `_ObjectChanged`, what `check` raises, or botocore's own errors.
        """
        starts = range(0, self.num_bytes, _PART_BYTES)
        calls = [partial(self._fetch, handle, start, min(start + _PART_BYTES, self.num_bytes)) for start in starts]
        # Waited for in any case: they write to the handle.
        do_side_by_side(calls, _MAX_CONNECTIONS, check, wait)

    def _fetch(self, handle: int, start: int, end: int, go_on: Callable[[], None]) -> None:
        for num_breaks in range(1, _MAX_BREAKS + 1):
            try:
                with closing(self._ask_for(start, end, go_on)) as body:
                    for chunk in body.iter_chunks(_CHUNK_BYTES):
                        is_too_much = len(chunk) > end - start
                        unwritten = chunk[: end - start]
                        while unwritten:  # a disk that is full takes less, and says so at the next write
                            num_written = os.pwrite(handle, unwritten, start)
                            unwritten = unwritten[num_written:]
                            start += num_written
                        go_on()
                        if is_too_much:
                            break
            except (HTTPClientError, IncompleteReadError):
                if num_breaks == _MAX_BREAKS:
                    raise
            if start == end:
                return
        raise _no_answer(f"{end - start:,} bytes short, {_MAX_BREAKS} times")

    def _ask_for(self, start: int, end: int, go_on: Callable[[], None]) -> "StreamingBody":
        wanted = f"bytes={start}-{end - 1}"
        try:
            response = _ask(lambda: self.client.get_object(IfMatch=self.etag, Range=wanted, **self.asked), go_on)
        except ClientError as error:
            if status_of(error) == HTTPStatus.PRECONDITION_FAILED:
                raise _ObjectChanged from None
            raise
        try:
            if "ETag" not in response or not _is_part(response, start, end):
                raise _no_answer(f"without an ETag, or with other bytes than {start}-{end - 1}")
            if response["ETag"] != self.etag:
                # It went on with another version: a store that does not know If-Match.
                raise _ObjectChanged
        except BaseException:
            response["Body"].close()
            raise
        return response["Body"]


def _is_part(response: "GetObjectOutputTypeDef", start: int, end: int) -> bool:
    """Whether the store says that it sends these bytes; one that does not know Range sends all there are."""
    length, told = response.get("ContentLength"), response.get("ContentRange")
    is_told = told is not None and told.startswith(f"bytes {start}-{end - 1}/")
    return length == end - start if told is None else is_told and length in (None, end - start)
