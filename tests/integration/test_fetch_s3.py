"""Objects are fetched from an S3 server over real HTTP; whatever goes wrong ends in the code that fits."""

import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, ClassVar

import boto3
import pytest
from moto.server import ThreadedMotoServer

from config.error_codes import ErrorCode
from config.job import ImagePart
from worker.media.prepare import MediaFault, MediaLimits, fetch

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

CONTENT = bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def store(endpoint: str) -> "S3Client":
    """A client of the server, which has the bucket `media` with one object."""
    client = boto3.session.Session().client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket="media")
    client.put_object(Bucket="media", Key="a folder/photo+1?.jpg", Body=CONTENT)
    return client


def fetch_one(uri: str, endpoint: str, folder: Path, **limits: float) -> bytes:
    allowed = MediaLimits(
        roots=(),
        s3_endpoint_url=endpoint,
        fetch_timeout_seconds=limits.get("timeout_seconds", 5.0),
        max_image_bytes=int(limits.get("max_bytes", 2**20)),
        max_image_pixels=10**6,
        max_video_bytes=2**20,
    )
    (medium,) = fetch([ImagePart(uri=uri)], allowed, folder)
    with medium.file as file:
        return file.read()


def fault_of(uri: str, endpoint: str, folder: Path, **limits: float) -> MediaFault:
    with pytest.raises(MediaFault) as caught:
        fetch_one(uri, endpoint, folder, **limits)
    assert caught.value.media_index == 0
    assert "secret" not in caught.value.message
    assert endpoint not in caught.value.message
    return caught.value


@pytest.mark.usefixtures("store")
def test_object_arrives_whole_whatever_signs_its_key_holds(endpoint: str, tmp_path: Path) -> None:
    assert fetch_one("s3://media/a folder/photo+1?.jpg", endpoint, tmp_path) == CONTENT
    assert len(list(tmp_path.iterdir())) == 1


def test_version_asked_for_is_the_one_fetched(store: "S3Client", endpoint: str, tmp_path: Path) -> None:
    store.put_bucket_versioning(Bucket="media", VersioningConfiguration={"Status": "Enabled"})
    first = store.put_object(Bucket="media", Key="photo.jpg", Body=b"first")["VersionId"]
    store.put_object(Bucket="media", Key="photo.jpg", Body=b"second")
    assert fetch_one("s3://media/photo.jpg", endpoint, tmp_path) == b"second"
    assert fetch_one(f"s3://media/photo.jpg?versionId={first}", endpoint, tmp_path) == b"first"


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize(
    "uri", ["s3://media/absent.jpg", "s3://absent-bucket/photo.jpg", "s3://media", "s3://media/", "s3://b@d/key"]
)
def test_what_the_store_does_not_have_is_not_found(endpoint: str, tmp_path: Path, uri: str) -> None:
    assert fault_of(uri, endpoint, tmp_path).code is ErrorCode.MEDIA_NOT_FOUND


@pytest.mark.usefixtures("store")
def test_large_object_is_refused_before_it_is_downloaded(endpoint: str, tmp_path: Path) -> None:
    fault = fault_of("s3://media/a folder/photo+1?.jpg", endpoint, tmp_path, max_bytes=1000)
    assert fault.code is ErrorCode.MEDIA_TOO_LARGE
    assert "10,240 bytes, the limit is 1,000" in fault.message
    assert not list(tmp_path.iterdir())


def test_store_that_is_down_is_unreachable(tmp_path: Path) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{reserved.getsockname()[1]}"
        assert fault_of("s3://media/photo.jpg", endpoint, tmp_path).code is ErrorCode.MEDIA_UNREACHABLE


def test_worker_without_credentials_says_so(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    # Clients are kept per endpoint and timeout, so another timeout makes a new one.
    fault = fault_of("s3://media/photo.jpg", endpoint, tmp_path, timeout_seconds=4.0)
    assert fault.code is ErrorCode.MEDIA_FORBIDDEN
    assert "AWS_ACCESS_KEY_ID" in fault.message


class _OddStore(BaseHTTPRequestHandler):
    """Answers each key in its own bad way."""

    requests: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.requests.append(self.path)
        match self.path.partition("?")[0]:
            case "/media/forbidden":
                self._answer(403, b"<Error><Code>AccessDenied</Code><Message>secret</Message></Error>")
            case "/media/busy":
                self._answer(503, b"<Error><Code>SlowDown</Code></Error>")
            case "/media/breaks_off":
                self._answer(200, CONTENT, promised=2 * len(CONTENT))
            case "/media/busy_once":
                is_first = self.requests.count(self.path) == 1
                self._answer(503 if is_first else 200, b"" if is_first else CONTENT)

    def _answer(self, status: int, body: bytes, promised: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(promised or len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """The tests' output is not the place."""


@pytest.fixture
def odd_store() -> Iterator[str]:
    _OddStore.requests.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), _OddStore) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("key", "code"),
    [
        ("forbidden", ErrorCode.MEDIA_FORBIDDEN),
        ("busy", ErrorCode.MEDIA_UNREACHABLE),
        ("breaks_off", ErrorCode.MEDIA_UNREACHABLE),
    ],
)
def test_bad_answer_has_its_code(odd_store: str, tmp_path: Path, key: str, code: ErrorCode) -> None:
    assert fault_of(f"s3://media/{key}", odd_store, tmp_path).code is code


def test_store_that_is_busy_once_is_asked_again(odd_store: str, tmp_path: Path) -> None:
    assert fetch_one("s3://media/busy_once", odd_store, tmp_path) == CONTENT


def test_store_that_falls_silent_is_unreachable_when_the_timeout_ends(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        fault = fault_of("s3://media/photo.jpg", endpoint, tmp_path, timeout_seconds=0.2)
    assert fault.code is ErrorCode.MEDIA_UNREACHABLE
