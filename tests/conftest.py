"""What every level of tests may ask for. Nothing here fakes a part that runs on this machine.

Packages are imported by the fixtures that need them: `tests/gpu` runs where there are only torch and transformers.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from redis import Redis

    from keye.producer import Client
    from keye.worker.media.job_media import DecoderPool
    from tests.support.zoo import Zoo


_warned_in: list[str] = []


def pytest_warning_recorded(nodeid: str) -> None:
    # On a GPU compilers warn of what is theirs to mend.
    if not nodeid.startswith("tests/gpu"):
        _warned_in.append(nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker tells of warnings instead of raising them; they are errors all the same, if only here at the end."""
    if _warned_in and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _warned_in:
        terminalreporter.write_line(f"red for warnings told in: {', '.join(sorted(set(_warned_in)))}", red=True)


@pytest.fixture(scope="session")
def valkey_url() -> Iterator[str]:
    from keye.worker.demo.embedded_valkey import EmbeddedValkey

    with EmbeddedValkey() as server:
        yield server.url


@pytest.fixture
def redis(valkey_url: str) -> "Iterator[Redis]":
    """A client of the session's server, emptied before and after each test."""
    from redis import Redis

    # A busy disk may hold up the append-only server for longer than the library's five seconds.
    with Redis.from_url(valkey_url, decode_responses=True, socket_timeout=60) as client:
        client.flushall()
        yield client
        client.flushall()


@pytest.fixture
def redis_url(redis: "Redis", valkey_url: str) -> str:
    """The emptied server's URL."""
    return valkey_url


@pytest.fixture
def client(redis_url: str) -> "Iterator[Client]":
    from keye.producer import Client

    with Client(redis_url) as client:
        yield client


@pytest.fixture
def meanwhile() -> Iterator[Callable[..., Any]]:
    """Has something done in a thread of its own, up to 64 at once; gives its future. None outlives the test."""
    with ThreadPoolExecutor(64) as threads:
        yield threads.submit


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> "Zoo":
    from tests.support.zoo import Zoo

    return Zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="session")
def decoders() -> "Iterator[DecoderPool]":
    from keye.worker.media.job_media import DecoderPool

    with DecoderPool(num_decoders=2, silence_seconds=60, max_decoded_bytes=2**30) as pool:
        yield pool


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    """The address of an empty S3 server on loopback."""
    # Slow to import, and most tests need none.
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()
