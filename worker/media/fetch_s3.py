"""Objects of S3 and its like: size checked from the headers, then streamed into a file. Credentials as boto3 does."""

import os
import tempfile
import threading
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
)

from config.error_codes import ErrorCode
from worker.media.fault import MediaFault
from worker.media.limits import MediaLimits
from worker.media.medium_name import name_medium
from worker.media.size_limit import check_size

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client
    from types_boto3_s3.type_defs import GetObjectOutputTypeDef

_CHUNK_BYTES = 2**20
_NOT_FOUND = {"NoSuchKey", "NoSuchBucket", "NoSuchVersion", "InvalidBucketName", "404"}
_PASSING = {"SlowDown", "RequestTimeout", "RequestTimeTooSkewed", "TooManyRequests", "InternalError"}


def fetch_object(uri: str, limits: MediaLimits, max_bytes: int, scratch_folder: Path) -> BinaryIO:
    """Copy `s3://bucket/key` (or `...?versionId=...`) into a new file of `scratch_folder` and open it."""
    name = name_medium(uri)
    bucket, key, version = _parse(uri, name)
    try:
        client = _client(limits.s3_endpoint_url, limits.fetch_timeout_seconds)
        if version:
            response = client.get_object(Bucket=bucket, Key=key, VersionId=version)
        else:
            response = client.get_object(Bucket=bucket, Key=key)
        return _receive(response, max_bytes, scratch_folder, name)
    except ClientError as error:
        raise _fault_of_answer(error, name) from None
    except ParamValidationError:
        raise MediaFault(ErrorCode.MEDIA_NOT_FOUND, f"{name}: is no valid bucket and key.") from None
    except (NoCredentialsError, PartialCredentialsError):
        raise MediaFault(
            ErrorCode.MEDIA_FORBIDDEN, f"{name}: this worker has no S3 credentials. Set AWS_ACCESS_KEY_ID or a role."
        ) from None
    except BotoCoreError as error:
        # The class alone: botocore's own sentence holds the whole URL.
        raise MediaFault(
            ErrorCode.MEDIA_UNREACHABLE, f"{name}: the store did not answer or broke off ({type(error).__name__})."
        ) from None


def _parse(uri: str, name: str) -> tuple[str, str, str]:
    bucket, _, key = uri[len("s3://") :].partition("/")
    key, _, version = key.partition("?versionId=")
    if uri[:5].lower() != "s3://" or not bucket or not key:
        raise MediaFault(ErrorCode.MEDIA_NOT_FOUND, f"{name}: names no object. Write s3://bucket/key.")
    return bucket, key, version


def _receive(response: "GetObjectOutputTypeDef", max_bytes: int, scratch_folder: Path, name: str) -> BinaryIO:
    with closing(response["Body"]) as body:
        check_size(response["ContentLength"], max_bytes, name)
        handle, path = tempfile.mkstemp(dir=scratch_folder)
        with os.fdopen(handle, "wb") as file:
            for chunk in body.iter_chunks(_CHUNK_BYTES):
                file.write(chunk)
    return open(path, "rb")


def _fault_of_answer(error: ClientError, name: str) -> MediaFault:
    reason = error.response.get("Error", {}).get("Code", "unknown")
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if reason in _PASSING or status >= 500 or status == 429:
        return MediaFault(ErrorCode.MEDIA_UNREACHABLE, f"{name}: the store answered {status} {reason}.")
    if reason in _NOT_FOUND or status == 404:
        return MediaFault(ErrorCode.MEDIA_NOT_FOUND, f"{name}: the store has no such object ({reason}).")
    return MediaFault(
        ErrorCode.MEDIA_FORBIDDEN, f"{name}: the store refused ({status} {reason}). Check the worker's credentials."
    )


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
        retries={"mode": "standard", "total_max_attempts": 3},
        max_pool_connections=32,
        # Other stores than AWS rarely have a host name for each bucket.
        s3={"addressing_style": "path" if endpoint_url else "auto"},
    )
    return boto3.session.Session().client("s3", endpoint_url=endpoint_url, config=config)
