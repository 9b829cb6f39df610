"""Objects are fetched from an S3 server over real HTTP; whatever goes wrong ends in the code that fits."""

import os
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Barrier, Event, Lock, Thread
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import boto3
import pytest

from keye.config.job import ImagePart
from keye.config.outcome import ErrorCode
from keye.config.settings import Settings
from keye.worker.media.job_media import MediaCache, MediaFault, MediaLimits, fetch

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

CONTENT = bytes(range(256)) * 40
PHOTO = "s3://media/a folder/photo+1?.jpg"
LARGE = os.urandom(20 * 2**20)


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")


@pytest.fixture
def store(s3_endpoint: str) -> "S3Client":
    """A client of the server, which has the bucket `media` with one object."""
    client = boto3.session.Session().client("s3", endpoint_url=s3_endpoint)
    client.create_bucket(Bucket="media")
    client.put_object(Bucket="media", Key="a folder/photo+1?.jpg", Body=CONTENT)
    return client


# What happens to one GET: an answer 503, one that ends after its first half or comes piece by piece, or an event first.
Trouble = Literal["busy", "breaks off", "drips"] | Callable[[], Any] | None


class Road(ThreadingHTTPServer):
    """Stands between the worker and the store; `meets` of the requests meet `troubles`, the last of them for ever."""

    def __init__(self, store: str) -> None:
        super().__init__(("127.0.0.1", 0), Traveller)
        self.store = store
        self.requests: list[str] = []
        self.meets = "GET"
        self.troubles: deque[Trouble] = deque([None])
        self.noting = Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def next_trouble(self, method: str) -> Trouble:
        with self.noting:
            self.requests.append(method)
            if method != self.meets:
                return None
            return self.troubles.popleft() if len(self.troubles) > 1 else self.troubles[0]


class Traveller(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Road

    def do_HEAD(self) -> None:
        self.forward(self.server.next_trouble("HEAD"))

    def do_GET(self) -> None:
        self.forward(self.server.next_trouble("GET"))

    def forward(self, trouble: Trouble) -> None:
        if trouble == "busy":
            reason = b"" if self.command == "HEAD" else b"<Error><Code>SlowDown</Code></Error>"
            self.answer(503, {"Retry-After": "7"}, reason)
            return
        if callable(trouble):
            trouble()
        far = HTTPConnection(urlsplit(self.server.store).netloc)
        far.request(self.command, self.path, headers=dict(self.headers))
        response = far.getresponse()
        body = response.read()
        self.answer(response.status, dict(response.headers), body, trouble)
        far.close()

    def answer(self, status: int, headers: dict[str, str], body: bytes, trouble: Trouble = None) -> None:
        self.send_response_only(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if trouble == "breaks off":
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        elif trouble == "drips":
            for start in range(0, len(body), 2**17):
                self.wfile.write(body[start : start + 2**17])
                time.sleep(0.05)
        else:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """The tests' output is not the place."""

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:
            self.close_connection = True  # the worker had enough


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


def fetch_one(uri: str, limits: MediaLimits, media_cache: MediaCache) -> bytes:
    (medium,) = fetch([ImagePart(uri=uri)], limits, media_cache)
    with medium.file as file:
        return file.read()


def fault_of(uri: str, limits: MediaLimits, media_cache: MediaCache) -> MediaFault:
    with pytest.raises(MediaFault) as caught:
        fetch_one(uri, limits, media_cache)
    assert caught.value.media_index == 0
    assert "secret" not in caught.value.message
    assert limits.s3_endpoint_url is None or limits.s3_endpoint_url not in caught.value.message
    return caught.value


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


@pytest.mark.usefixtures("store")
def test_ten_questions_download_an_object_once_even_at_once(
    road: Road, limits: MediaLimits, media_cache: MediaCache
) -> None:
    with ThreadPoolExecutor(5) as pool:
        answers = list(pool.map(lambda _: fetch_one(PHOTO, limits, media_cache), range(10)))
    assert set(answers) == {CONTENT}
    assert road.requests.count("GET") == 1


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


def test_part_that_breaks_off_is_taken_up_where_it_ended(
    store: "S3Client", road: Road, limits: MediaLimits, media_cache: MediaCache
) -> None:
    store.put_object(Bucket="media", Key="large.mp4", Body=LARGE)
    road.troubles = deque(["breaks off", None, "busy", "breaks off", "breaks off", None])
    assert fetch_one("s3://media/large.mp4", limits, media_cache) == LARGE


def test_object_replaced_under_the_reading_is_read_anew_and_never_mixed(
    store: "S3Client", road: Road, limits: MediaLimits, media_cache: MediaCache
) -> None:
    store.put_object(Bucket="media", Key="large.mp4", Body=LARGE)
    other = LARGE[::-1]
    # After the first part, or two of them; the rest would come from the other.
    road.troubles = deque([None, lambda: store.put_object(Bucket="media", Key="large.mp4", Body=other), None])
    assert fetch_one("s3://media/large.mp4", limits, media_cache) == other


def test_object_that_never_rests_is_unreachable(
    store: "S3Client", road: Road, limits: MediaLimits, media_cache: MediaCache
) -> None:
    road.troubles = deque(
        [lambda: store.put_object(Bucket="media", Key="a folder/photo+1?.jpg", Body=os.urandom(1000))]
    )
    fault = fault_of(PHOTO, limits, media_cache)
    assert fault.code is ErrorCode.MEDIA_UNREACHABLE
    assert "replaced 3 times" in fault.message


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize(
    "uri", ["s3://media/absent.jpg", "s3://absent-bucket/photo.jpg", "s3://media", "s3://media/", "s3://b@d/key"]
)
def test_what_the_store_does_not_have_is_not_found(limits: MediaLimits, media_cache: MediaCache, uri: str) -> None:
    assert fault_of(uri, limits, media_cache).code is ErrorCode.MEDIA_NOT_FOUND


@pytest.mark.usefixtures("store")
def test_object_deleted_between_asking_and_reading_is_not_found(
    store: "S3Client", road: Road, limits: MediaLimits, media_cache: MediaCache
) -> None:
    road.troubles = deque([lambda: store.delete_object(Bucket="media", Key="a folder/photo+1?.jpg")])
    assert fault_of(PHOTO, limits, media_cache).code is ErrorCode.MEDIA_NOT_FOUND


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


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("trouble", ["busy", "breaks off"])
def test_store_that_fails_for_good_is_unreachable_and_leaves_nothing(
    road: Road, limits: MediaLimits, media_cache: MediaCache, tmp_path: Path, trouble: Trouble
) -> None:
    road.troubles = deque([trouble])
    fault = fault_of(PHOTO, limits, media_cache)
    assert fault.code is ErrorCode.MEDIA_UNREACHABLE
    assert fault.retry_after_seconds == (7 if trouble == "busy" else None)
    assert not [path for path in (tmp_path / "cache").glob("*/*") if path.is_file()]


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_store_that_is_busy_once_is_asked_again(
    road: Road, limits: MediaLimits, media_cache: MediaCache, method: str
) -> None:
    road.meets = method
    road.troubles = deque(["busy", None])
    assert fetch_one(PHOTO, limits, media_cache) == CONTENT


def test_store_that_sends_too_slowly_is_unreachable_in_time(
    store: "S3Client", road: Road, limits: MediaLimits, media_cache: MediaCache
) -> None:
    store.put_object(Bucket="media", Key="large.mp4", Body=LARGE)
    road.troubles = deque(["drips"])
    started_at = time.monotonic()
    fault = fault_of("s3://media/large.mp4", replace(limits, max_fetch_seconds=0.3), media_cache)
    assert time.monotonic() - started_at < 5
    assert fault.code is ErrorCode.MEDIA_UNREACHABLE
    assert "KEYE_MAX_FETCH_SECONDS" in fault.message


def test_job_that_is_over_ends_its_download_at_once_and_nothing_of_it_is_kept(
    store: "S3Client", road: Road, limits: MediaLimits, media_cache: MediaCache, tmp_path: Path
) -> None:
    class JobCancelled(Exception):
        pass

    def check() -> None:
        if "GET" in road.requests:
            raise JobCancelled

    store.put_object(Bucket="media", Key="large.mp4", Body=LARGE)
    road.troubles = deque(["drips"])
    started_at = time.monotonic()
    with pytest.raises(JobCancelled):
        fetch([ImagePart(uri="s3://media/large.mp4")], limits, media_cache, check)
    assert time.monotonic() - started_at < 5
    while list((tmp_path / "cache" / "partial").iterdir()):
        time.sleep(0.01)
    assert not list((tmp_path / "cache" / "whole").iterdir())


def test_media_of_one_job_come_side_by_side_and_in_order(
    store: "S3Client", road: Road, limits: MediaLimits, media_cache: MediaCache
) -> None:
    contents = [os.urandom(1000) for _ in range(8)]
    for number, content in enumerate(contents):
        store.put_object(Bucket="media", Key=f"{number}.jpg", Body=content)
    road.troubles = deque([Barrier(len(contents), timeout=20).wait])
    fetched = fetch([ImagePart(uri=f"s3://media/{number}.jpg") for number in range(8)], limits, media_cache)
    assert [medium.file.read() for medium in fetched] == contents
    assert [medium.name for medium in fetched] == [f"s3://media/{number}.jpg" for number in range(8)]
    for medium in fetched:
        medium.file.close()


def test_medium_that_cannot_be_had_ends_the_downloads_of_the_others(
    store: "S3Client", road: Road, limits: MediaLimits, media_cache: MediaCache, tmp_path: Path
) -> None:
    store.put_object(Bucket="media", Key="large.mp4", Body=LARGE)
    road.troubles = deque(["drips"])
    uris = ["s3://media/large.mp4", "s3://media/absent.jpg"]
    with pytest.raises(MediaFault) as caught:
        fetch([ImagePart(uri=uri) for uri in uris], limits, media_cache)
    assert (caught.value.code, caught.value.media_index) == (ErrorCode.MEDIA_NOT_FOUND, 1)
    while list((tmp_path / "cache" / "partial").iterdir()):
        time.sleep(0.01)
    assert not list((tmp_path / "cache" / "whole").iterdir())


def test_job_that_is_over_does_not_wait_for_a_silent_store(limits: MediaLimits, media_cache: MediaCache) -> None:
    class JobCancelled(Exception):
        pass

    def cancel() -> None:
        raise JobCancelled

    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent_store = f"http://127.0.0.1:{silent.getsockname()[1]}"
        slow = replace(limits, s3_endpoint_url=silent_store, fetch_timeout_seconds=3)
        started_at = time.monotonic()
        with pytest.raises(JobCancelled):
            fetch([ImagePart(uri=PHOTO)], slow, media_cache, cancel)
        assert time.monotonic() - started_at < 5


def test_process_ends_while_a_store_is_silent_in_the_midst_of_a_download(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from keye.config.job import ImagePart
from keye.config.settings import Settings
from keye.worker.media.job_media import MediaCache, MediaLimits, fetch
def end():
    if Path(sys.argv[1], "asked").exists():
        sys.exit(7)
limits = MediaLimits.of(Settings(s3_endpoint_url=sys.argv[2], fetch_timeout_seconds=300, max_fetch_seconds=300))
fetch([ImagePart(uri="s3://media/photo.jpg")], limits, MediaCache(Path(sys.argv[1]), 0), end)
"""
    over = Event()

    class Silent(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200)
            self.send_header("ETag", '"1"')
            self.send_header("Content-Length", "1000")
            self.end_headers()

        def do_GET(self) -> None:
            (tmp_path / "asked").touch()
            over.wait()

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Silent) as store:
        Thread(target=store.serve_forever, args=(0.01,)).start()
        try:
            store_url = f"http://127.0.0.1:{store.server_port}"
            assert subprocess.run([sys.executable, "-c", code, tmp_path, store_url], timeout=30).returncode == 7
        finally:
            over.set()
            store.shutdown()


def test_store_that_falls_silent_is_unreachable_when_the_timeout_ends(
    limits: MediaLimits, media_cache: MediaCache
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent_store = f"http://127.0.0.1:{silent.getsockname()[1]}"
        quick = replace(limits, s3_endpoint_url=silent_store, fetch_timeout_seconds=0.1)
        assert fault_of(PHOTO, quick, media_cache).code is ErrorCode.MEDIA_UNREACHABLE


def test_store_that_is_down_is_unreachable(limits: MediaLimits, media_cache: MediaCache) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        down = replace(limits, s3_endpoint_url=f"http://127.0.0.1:{reserved.getsockname()[1]}")
        assert fault_of(PHOTO, down, media_cache).code is ErrorCode.MEDIA_UNREACHABLE


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
