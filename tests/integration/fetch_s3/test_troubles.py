"""A slow, silent, busy or absent store, or an object that changes meanwhile, ends in the code that fits, in time."""

import os
import socket
import subprocess
import sys
import time
from collections import deque
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING

import pytest

from keye.config.codes import ErrorCode
from keye.config.faults import Fault
from keye.config.job import ImagePart
from keye.worker.media.job_media import MediaCache, MediaLimits, fetch

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client
from tests.integration.fetch_s3.road import CONTENT, LARGE, PHOTO, Road, Trouble
from tests.support.fetching import fault_of, fetch_one


def test_part_that_breaks_off_is_taken_up_where_it_ended(
    store: "S3Client", road: Road, limits: MediaLimits, media_cache: MediaCache
) -> None:
    store.put_object(Bucket="media", Key="large.mp4", Body=LARGE)
    road.troubles = deque(["breaks off", None, "busy", "breaks off", "breaks off", None])
    assert fetch_one("s3://media/large.mp4", limits, media_cache) == LARGE


@pytest.mark.holds(
    "docs/operations.md#which-media-does-a-worker-read",
    "where it is replaced meanwhile, reading begins anew",
)
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
def test_object_deleted_between_asking_and_reading_is_not_found(
    store: "S3Client", road: Road, limits: MediaLimits, media_cache: MediaCache
) -> None:
    road.troubles = deque([lambda: store.delete_object(Bucket="media", Key="a folder/photo+1?.jpg")])
    assert fault_of(PHOTO, limits, media_cache).code is ErrorCode.MEDIA_NOT_FOUND


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


def test_an_endpoint_of_aws_settings_that_is_no_url_is_the_workers_trouble(
    limits: MediaLimits, media_cache: MediaCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "no such")
    fault = fault_of(
        "s3://media/cat.jpg", replace(limits, s3_endpoint_url=None, fetch_timeout_seconds=5.5), media_cache
    )
    assert fault.code is ErrorCode.MEDIA_UNREACHABLE
    assert "this worker's AWS_ENDPOINT_URL is no URL" in fault.message


@pytest.mark.holds(
    "docs/reliability.md#promises",
    "Fetching, decoding, generating and the",
)
@pytest.mark.holds("docs/operations.md#how-long-may-a-job-take", "a download | `KEYE_MAX_FETCH_SECONDS`")
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


@pytest.mark.holds(
    "docs/operations.md#which-media-does-a-worker-read",
    "the first that cannot be had or decoded ends the others",
)
def test_medium_that_cannot_be_had_ends_the_downloads_of_the_others(
    store: "S3Client", road: Road, limits: MediaLimits, media_cache: MediaCache, tmp_path: Path
) -> None:
    store.put_object(Bucket="media", Key="large.mp4", Body=LARGE)
    road.troubles = deque(["drips"])
    uris = ["s3://media/large.mp4", "s3://media/absent.jpg"]
    with pytest.raises(Fault) as caught:
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


@pytest.mark.holds(
    "docs/reliability.md#promises",
    "A download that a silent",
)
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


@pytest.mark.holds("docs/operations.md#how-long-may-a-job-take", "silence `KEYE_FETCH_TIMEOUT_SECONDS`")
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


def test_credentials_that_do_not_come_count_against_the_time_of_a_download(
    limits: MediaLimits, media_cache: MediaCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "never")
    (tmp_path / "config").write_text(f"[default]\ncredential_process = cat {tmp_path}/never\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    try:
        fault = fault_of(PHOTO, replace(limits, max_fetch_seconds=0.5), media_cache)
    finally:
        (tmp_path / "never").write_bytes(b"")
    assert fault.code is ErrorCode.MEDIA_UNREACHABLE
    assert "(KEYE_MAX_FETCH_SECONDS)" in fault.message
