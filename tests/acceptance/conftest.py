"""Starts the real commands as processes of their own, on the CPU, against the real broker, and ends all of them."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Protocol

import pytest
from celery import Celery
from PIL import Image
from redis import Redis
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

from keye.config.presence import Presence, WorkerState, list_present
from keye.config.topology import ANALYZE_TASK
from tests.acceptance.celery_clients import PRINTED_URL, printed
from tests.support.checkout import PYTHONPATH, ROOT
from tests.support.conditions import eventually

ECHO = ("celery", "-A", "tests.support.echo_worker", "worker", "--pool", "threads", "--loglevel", "INFO")
"""A worker for `start` that loads nothing; see tests/support/echo_worker.py."""
OWN = ("celery", "-A", "results", "worker", "--pool", "solo", "--loglevel", "INFO", "-n", "results@%h")
"""The app of docs/celery.md that goes on with answers."""
CHECKPOINTS = [ROOT / "worker/demo/checkpoint", ROOT / "tests/golden/preview/checkpoint"]


def is_alive(pid: int) -> bool:
    """A zombie has ended; only its parent has not looked yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@dataclass
class Started:
    process: subprocess.Popen[bytes]
    log_file: Path
    redis: Redis

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def wait_until_ready(self, other_than: int | None = None) -> Presence:
        """The presence of the first ready worker process, not the one that is told apart."""

        def look() -> Presence | None:
            assert self.process.poll() is None, self.log
            present = list_present(self.redis)
            return next((p for p in present if p.state is WorkerState.READY and p.worker.pid != other_than), None)

        return eventually(look, within_seconds=150)

    def ask_to_end(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def exit_code(self, within_seconds: float = 30) -> int:
        return self.process.wait(within_seconds)


class Start(Protocol):
    def __call__(self, *command: str, **settings: str) -> Started: ...


def faulty_engine(fault: Path) -> dict[str, str]:
    """Settings for a worker whose engine does what the file says; see there."""
    # Celery's own way to have a worker import a module.
    include = "tests.acceptance.faulty_engine"
    return {"CELERY_WORKER_INCLUDE": include, "KEYE_TEST_FAULT": str(fault)}


@pytest.fixture
def checkpoint() -> Path:
    """The small trained Keye; the random one of the goldens does where answers are not looked at."""
    return next(folder for folder in CHECKPOINTS if (folder / "config.json").is_file())


@pytest.fixture
def start(redis: Redis, redis_url: str, checkpoint: Path, tmp_path: Path) -> Iterator[Start]:
    started: list[Started] = []

    def run(*command: str, **settings: str) -> Started:
        environ = os.environ | {
            "PYTHONPATH": PYTHONPATH,
            "KEYE_REDIS_URL": redis_url,
            "KEYE_MODEL_PATH": str(checkpoint),
            "KEYE_MEDIA_ROOTS": str(tmp_path),
            "KEYE_SPOOL_FOLDER": str(tmp_path / "spool"),
            "KEYE_RUN_FOLDER": str(tmp_path / "run"),
            "KEYE_DEVICE": "cpu",
            "OMP_NUM_THREADS": "2",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            **settings,
        }
        log_file = tmp_path / f"worker{len(started)}.log"
        with log_file.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", *command], env=environ, stdout=log, stderr=subprocess.STDOUT, cwd=tmp_path
            )
        started.append(Started(process, log_file, redis))
        return started[-1]

    yield run
    for each in started:
        each.process.kill()
        each.process.wait()


@pytest.fixture
def s3_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")


class Serve(Protocol):
    def __call__(self, folder: Path, port: int = 0, **settings: str) -> tuple[Started, str]: ...


@pytest.fixture
def serve(start: Start) -> Serve:
    """Runs `app.py` of a folder as its docstring says; gives the process and its address."""

    def run(folder: Path, port: int = 0, **settings: str) -> tuple[Started, str]:
        options = ("--app-dir", str(folder), "--port", str(port), "--timeout-graceful-shutdown", "3")
        server = start("uvicorn", "app:app", *options, **settings)

        def look() -> re.Match[str] | None:
            assert server.process.poll() is None, server.log
            return re.search(r"running on (http://\S+)", server.log)

        return server, eventually(look)[1]

    return run


def npm_install(folder: Path, package: str) -> None:
    """Puts what Node is to import from this folder there; skips where there is no Node, no npm or no registry."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("Node and npm are not installed")
    command = ["npm", "install", "--prefix", str(folder), "--no-audit", "--no-fund", package]
    try:
        subprocess.run(command, capture_output=True, timeout=90, check=True)
    except subprocess.SubprocessError as fault:
        pytest.skip(f"npm brings no {package}: {fault}")


def red_picture() -> bytes:
    picture = BytesIO()
    Image.new("RGB", (84, 84), "red").save(picture, "PNG")
    return picture.getvalue()


PICTURE = red_picture()


class SlowStore(ThreadingHTTPServer):
    """An S3 endpoint that answers every GET with the same picture, but only once it is told to go on."""

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _SlowAnswer)
        self.may_go_on = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"


class _SlowAnswer(BaseHTTPRequestHandler):
    server: SlowStore

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_GET(self) -> None:
        self.server.may_go_on.wait()
        # Who asked may have been killed meanwhile.
        with suppress(ConnectionError):
            self._answer(PICTURE)

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(PICTURE)))
        self.send_header("ETag", '"red"')
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """The tests' output is not the place."""


@pytest.fixture
def slow_store() -> Iterator[SlowStore]:
    with SlowStore() as store:
        thread = threading.Thread(target=store.serve_forever)
        thread.start()
        yield store
        store.may_go_on.set()
        store.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Chrome]:
    """Debian's Chromium; its log "performance" has what it asks the network for."""
    driver = shutil.which("chromedriver")
    if driver is None:
        told = "Chromium is not installed: apt-get install chromium chromium-driver"
        pytest.fail(told) if os.environ.get("REQUIRE_CHROMIUM") else pytest.skip(told)
    options = ChromeOptions()
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    # Chromium's sandbox is not for root, and /dev/shm is small in containers.
    for option in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(option)
    with Chrome(options, Service(driver)) as browser:
        yield browser


@pytest.fixture
def app(redis_url: str) -> Iterator[Celery]:
    """A client's, as it comes."""
    with Celery("client", broker=redis_url, backend=redis_url, set_as_current=False) as app:
        # The worker's own task is shared with every app of a process in which another test has imported it.
        app.finalize()
        app.tasks.pop(ANALYZE_TASK, None)
        yield app
        # Results that are garbage later would end a subscription at a server that is gone by then.
        app.backend.result_consumer.subscribed_to.clear()


@pytest.fixture
def start_own(start: Start, tmp_path: Path, redis_url: str) -> Callable[[], Started]:
    """The page's app of the user's own."""

    def run() -> Started:
        source, _ = printed("Go on with the answer: link, chain, group, chord")
        (tmp_path / "results.py").write_text(source.replace(PRINTED_URL, redis_url))
        own = start(*OWN)
        eventually(lambda: " ready." in own.log, within_seconds=60)
        return own

    return run
