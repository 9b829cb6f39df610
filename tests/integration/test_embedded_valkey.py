"""The embedded server ends with its owner, on every way out."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from redis import Redis
from redis.exceptions import ConnectionError

from keye.worker.demo.embedded_valkey import EmbeddedValkey
from tests.support import neighbour
from tests.support.conditions import eventually
from tests.support.neighbour import needs_root
from tests.support.started_processes import living

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


@needs_root
def test_another_user_of_the_host_does_not_get_in(tmp_path: Path) -> None:
    with guardian(tmp_path) as process:
        assert process.stdout is not None
        url = process.stdout.readline().decode().strip()
        port, password = urlsplit(url).port, urlsplit(url).password
        knock = f"""
import socket, sys
peer = socket.create_connection(("127.0.0.1", {port}))
for words in ("PING", "CONFIG SET dir /tmp", "AUTH wrong", "HELLO 3"):
    peer.sendall(words.encode() + b"\\r\\n")
    print(peer.recv(200).split()[0].decode())
"""
        answers = neighbour.python_as(neighbour.UID, "import encodings.idna, socket", knock).split()
        assert answers == ["-NOAUTH", "-NOAUTH", "-WRONGPASS", "-NOAUTH"]
        (folder,) = tmp_path.iterdir()
        assert folder.stat().st_mode & 0o777 == 0o700
        command_lines = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
        assert password not in command_lines
        with Redis.from_url(url, decode_responses=True) as client:
            assert set(client.config_get("enable-*").values()) == {"no"}
            assert client.config_get("bind") == {"bind": "127.0.0.1"}
        process.communicate()


GUARDIAN = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from keye.worker.demo.embedded_valkey import guard
guard()
"""


def guardian(folder: Path) -> "subprocess.Popen[bytes]":
    environ = os.environ | {"TMPDIR": str(folder)}
    command = [sys.executable, "-c", GUARDIAN]
    return subprocess.Popen(command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_guardian_ends_its_server_too(sent: signal.Signals, tmp_path: Path) -> None:
    with guardian(tmp_path) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        assert len(living(tmp_path)) == 2
        process.send_signal(sent)
        assert process.wait(30) == -sent
    assert not living(tmp_path)
    assert not [*tmp_path.iterdir()]


def test_a_signal_to_the_guardian_ends_its_server_at_whatever_moment_it_comes(tmp_path: Path) -> None:
    for tick in range(16):
        with guardian(tmp_path) as process:
            time.sleep(tick / 20)
            process.terminate()
            assert process.wait(30) == -signal.SIGTERM
        assert not living(tmp_path), tick
        assert not [*tmp_path.iterdir()], tick
