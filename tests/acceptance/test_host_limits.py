"""What a worker's jobs take of a host, counted: by this the limits of a host are judged."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread

import pytest

from keye.producer import Client
from keye.worker.daemon.host_limits import FILES_A_DECODER, FILES_A_JOB, FILES_AT_REST, THREADS_A_JOB, THREADS_AT_REST
from tests.acceptance.conftest import ECHO, Start
from tests.support.conditions import eventually

# Eight parts.
LARGE_BYTES = 60 * 2**20
NUM_JOBS = 2


class SilentStore(ThreadingHTTPServer):
    """An S3 endpoint that begins to answer for large objects, and says no more."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Beginning)
        self.may_end = Event()


class _Beginning(BaseHTTPRequestHandler):
    server: SilentStore
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._begin(200, LARGE_BYTES)

    def do_GET(self) -> None:
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        self._begin(206, last + 1 - first)
        self.server.may_end.wait()
        self.close_connection = True

    def _begin(self, status: int, num_bytes: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(num_bytes))
        self.send_header("ETag", '"large"')
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """The tests' output is not the place."""


@pytest.fixture
def store() -> Iterator[SilentStore]:
    with SilentStore() as store:
        thread = Thread(target=store.serve_forever, args=(0.01,))
        thread.start()
        yield store
        store.may_end.set()
        store.shutdown()
        thread.join()


@pytest.mark.holds("docs/operations.md#it-does-not-start-why", "which takes 72 files and 73 threads")
def test_files_and_threads_of_jobs_are_what_limits_are_held_against(
    start: Start, client: Client, store: SilentStore
) -> None:
    settings = {"KEYE_CONCURRENCY": str(NUM_JOBS), "KEYE_DECODERS": "2"}
    worker = start(*ECHO, KEYE_S3_ENDPOINT_URL=f"http://127.0.0.1:{store.server_port}", **settings)
    worker.wait_until_ready()
    process = Path(f"/proc/{worker.process.pid}")

    def count(kind: str) -> int:
        return len(os.listdir(process / kind))

    files, threads = count("fd"), count("task")
    assert files <= FILES_AT_REST + 2 * FILES_A_DECODER
    assert threads <= THREADS_AT_REST
    for number in range(NUM_JOBS):
        client.submit(prompt="?", media=[f"s3://videos/{number}-{part}.png" for part in range(8)])
    # A few more than those of the media: connections to Redis, a client of the store.
    eventually(lambda: 0 <= count("fd") - files - NUM_JOBS * FILES_A_JOB <= 16, within_seconds=60)
    eventually(lambda: abs(count("task") - threads - NUM_JOBS * THREADS_A_JOB) <= 16, within_seconds=60)


@pytest.mark.skipif(
    shutil.which("unshare") is None or os.geteuid() != 0, reason="only root takes /dev/shm from a process"
)
def test_no_part_of_a_worker_needs_dev_shm(tmp_path: Path) -> None:
    without = 'mount -t tmpfs -o ro tmpfs /dev/shm && exec "$@"'
    demo = [sys.executable, "-m", "keye.worker.daemon.cli", "demo"]
    ended = subprocess.run(
        ["unshare", "-m", "sh", "-c", without, "-", *demo], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    if "unshare failed" in ended.stderr or "mount:" in ended.stderr:
        pytest.skip(ended.stderr)
    assert ended.returncode == 0, ended.stdout + ended.stderr
