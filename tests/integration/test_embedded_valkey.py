"""The embedded server ends with its owner, on every way out."""

import signal
import subprocess
import sys

import pytest
from redis import Redis
from redis.exceptions import ConnectionError

from keye.worker.demo.embedded_valkey import EmbeddedValkey
from tests.support.conditions import eventually

OWNER = """
import signal, time
from keye.worker.demo.embedded_valkey import EmbeddedValkey
# Whoever runs the tests in the background has them ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
with EmbeddedValkey() as server:
    print(server.url, flush=True)
    while True:
        time.sleep(0.1)
"""


def is_gone(url: str) -> bool:
    with Redis.from_url(url) as client:
        try:
            return not client.ping()
        except ConnectionError:
            return True


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_server_stops_when_its_owner_is_ended_by(sent: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as owner:
        assert owner.stdout is not None
        url = owner.stdout.readline().decode().strip()
        with Redis.from_url(url) as client:
            assert client.ping()
        owner.send_signal(sent)
        owner.wait()
    eventually(lambda: is_gone(url))


def test_server_keeps_jobs_on_disk_and_never_evicts() -> None:
    with EmbeddedValkey() as server, Redis.from_url(server.url, decode_responses=True) as client:
        assert client.config_get("appendonly") == {"appendonly": "yes"}
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
    eventually(lambda: is_gone(server.url))
