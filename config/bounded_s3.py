"""Clients of S3 that no store holds up: how much of an answer they hold, for how long they read it, what they quote."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from http import HTTPStatus
from io import BytesIO
from time import monotonic
from typing import TYPE_CHECKING, Any

from botocore.awsrequest import (
    AWSHTTPConnection,
    AWSHTTPConnectionPool,
    AWSHTTPSConnection,
    AWSHTTPSConnectionPool,
    AWSPreparedRequest,
    AWSResponse,
)
from botocore.exceptions import ClientError, HTTPClientError, ReadTimeoutError
from botocore.httpsession import URLLib3Session
from botocore.model import OperationModel
from urllib3.exceptions import HTTPError

from keye.config.bounded_socket import BoundedSocket

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

# Of an answer that is no object. An error says what matters in its first lines, a list of buckets may be long.
_MAX_BYTES = 4 * 2**20
_MAX_ERROR_BYTES = 64 * 2**10
# Of one answer, its object included, where nobody says how long it may take.
_MAX_SECONDS = 60

_REDIRECTS = (301, 302, 307)

_go_on: ContextVar[Callable[[], None] | None] = ContextVar("go_on", default=None)


def bound(client: "S3Client") -> "S3Client":
    """The same client. botocore itself would read all of an error, or of any other answer that is no object, whole."""
    # Not by the event before-send: it would be sent in earnest where a test has moto answer instead.
    endpoint = client._endpoint  # type: ignore[attr-defined]
    endpoint.http_session = _BoundedSession(endpoint.http_session)
    client.meta.events.register_first("needs-retry.s3.HeadBucket", _take_redirect)
    return client


def _take_redirect(response: tuple[AWSResponse, Any] | None, operation: OperationModel, **_: Any) -> None:
    """Of a question that botocore asks to learn where a bucket is: redirected, it would ask it again, for ever."""
    if response and response[0].status_code in _REDIRECTS:
        raise ClientError(response[1], operation.name)


@contextmanager
def watched_by(go_on: Callable[[], None]) -> Iterator[None]:
    """`go_on` is called several times a second while this thread, or one begun here with its context, reads an answer.

    What it raises ends the reading, and comes out of the client.
    """
    token = _go_on.set(go_on)
    try:
        yield
    finally:
        _go_on.reset(token)


def code_of(error: ClientError) -> str:
    """What a store may be quoted with: its code where that looks like one, else its status."""
    code = error.response.get("Error", {}).get("Code")
    is_one = isinstance(code, str) and re.fullmatch(r"[A-Za-z0-9.]{1,64}", code)
    return str(code if is_one else status_of(error))


def status_of(error: ClientError) -> int:
    return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)


class _BoundedSession:
    def __init__(self, session: URLLib3Session) -> None:
        self._session = session
        session._pool_classes_by_scheme.update(http=_Pool, https=_PoolOfTls)  # type: ignore[attr-defined]

    def send(self, request: AWSPreparedRequest) -> AWSResponse:
        # A try that follows others: the one who asked may be gone by now.
        if go_on := _go_on.get():
            go_on()
        is_object, request.stream_output = request.stream_output, True
        try:
            response = self._session.send(request)
            is_error = response.status_code >= HTTPStatus.MULTIPLE_CHOICES
            if is_error or not is_object:
                response.raw = _read_start(response.raw, is_error)
        except HTTPError as error:
            raise HTTPClientError(error=error) from None
        except HTTPClientError:
            # It wraps whatever ended the reading.
            if go_on:
                go_on()
            raise
        return response

    def close(self) -> None:
        self._session.close()


class _Held(BytesIO):
    """An answer that has been read."""

    def stream(self) -> Iterator[bytes]:
        yield self.read()


def _read_start(raw: Any, is_error: bool) -> _Held:
    """What botocore gets of an answer; the rest of a longer one is left, and its connection closed."""
    max_bytes = _MAX_ERROR_BYTES if is_error else _MAX_BYTES
    try:
        content = raw.read(max_bytes + 1)
    except HTTPError:
        if not is_error:
            raise
        # Its status is known, and more of it is not needed.
        content = b""
    if len(content) > max_bytes:
        raw.close()
    return _Held(content[:max_bytes])


def _watch() -> Callable[[], None]:
    return _go_on.get() or partial(_end_at, monotonic() + _MAX_SECONDS)


def _end_at(ends_at: float) -> None:
    if monotonic() > ends_at:
        raise ReadTimeoutError(endpoint_url="the store")


class _Connection(AWSHTTPConnection):
    def connect(self) -> None:
        super().connect()
        self.sock = BoundedSocket(self.sock, _watch)


class _ConnectionByTls(AWSHTTPSConnection):
    def connect(self) -> None:
        super().connect()
        self.sock = BoundedSocket(self.sock, _watch)


class _Pool(AWSHTTPConnectionPool):
    ConnectionCls = _Connection


class _PoolOfTls(AWSHTTPSConnectionPool):
    ConnectionCls = _ConnectionByTls
