"""One version of an object of a store, copied into a file: in parts side by side, each taken up where it broke off."""

import os
import threading
from concurrent.futures import as_completed, wait
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING

from botocore.exceptions import ClientError, HTTPClientError, IncompleteReadError

from keye.worker.media.fetch.transfer import Transfer
from keye.worker.media.side_by_side import cancel_calls, start_calls

if TYPE_CHECKING:
    from botocore.response import StreamingBody
    from types_boto3_s3 import S3Client
    from types_boto3_s3.type_defs import GetObjectRequestTypeDef

_MAX_CONNECTIONS = 8

_PART_BYTES = 8 * 2**20
_CHUNK_BYTES = 64 * 2**10

# How often one part may break off; refused connections and answers such as 503 botocore tries again by itself.
_MAX_BREAKS = 4


@dataclass(frozen=True, slots=True)
class ObjectVersion:
    """`version_id` is "" where the caller asked for none; `etag` pins the version all the same."""

    bucket: str
    key: str
    version_id: str
    etag: str
    num_bytes: int


class ObjectChanged(Exception):
    """The object was replaced since its `ObjectVersion` was read."""


class RangedDownload:
    """Called with a file's handle, it writes the whole object there.

    Raises `ObjectChanged`, what `transfer.go_on` raises, or botocore's own errors.
    """

    def __init__(self, client: "S3Client", version: ObjectVersion, transfer: Transfer) -> None:
        self._client = client
        self._version = version
        self._transfer = transfer
        self._given_up = threading.Event()

    def __call__(self, handle: int) -> None:
        num_bytes = self._version.num_bytes
        starts = range(0, num_bytes, _PART_BYTES)
        calls = [partial(self._fetch, handle, start, min(start + _PART_BYTES, num_bytes)) for start in starts]
        parts = start_calls(calls, _MAX_CONNECTIONS)
        try:
            for part in as_completed(parts):
                part.result()
        except BaseException:
            self._given_up.set()
            cancel_calls(parts)
            wait(parts)  # they write to the handle
            raise

    def _fetch(self, handle: int, start: int, end: int) -> None:
        num_breaks = 0
        while start < end:
            try:
                with closing(self._ask(start, end)) as body:
                    for chunk in body.iter_chunks(_CHUNK_BYTES):
                        num_written = os.pwrite(handle, chunk, start)
                        start += num_written
                        if self._given_up.is_set():
                            return
                        self._transfer.go_on()
                        if num_written < len(chunk):
                            break  # the disk is full, and says so at the next write
            except (HTTPClientError, IncompleteReadError):
                num_breaks += 1
                if num_breaks == _MAX_BREAKS:
                    raise

    def _ask(self, start: int, end: int) -> "StreamingBody":
        asked = self._version
        request: GetObjectRequestTypeDef = {
            "Bucket": asked.bucket,
            "Key": asked.key,
            "IfMatch": asked.etag,
            "Range": f"bytes={start}-{end - 1}",
        }
        if asked.version_id:
            request["VersionId"] = asked.version_id
        try:
            response = self._client.get_object(**request)
        except ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] == HTTPStatus.PRECONDITION_FAILED:
                raise ObjectChanged from None
            raise
        if response["ETag"] != asked.etag or response["ContentLength"] != end - start:
            # It went on with another version, or sends all of it: a store that knows neither If-Match nor Range.
            response["Body"].close()
            raise ObjectChanged
        return response["Body"]
