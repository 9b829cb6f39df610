"""The commands that show jobs, or cancel them, where there is no Redis, another server, or one that is mute."""

import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from typer.testing import CliRunner

from keye.producer.cli import app
from keye.producer.shell import ExitCode
from tests.support.ports import free_port
from tests.support.redis_server import RedisServer

COMMANDS = ["status somebody", "list", "top --json --interval 1", "cancel --all-queued --yes"]


@contextmanager
def listening(says: bytes | None) -> Iterator[str]:
    """A server that says this to whatever it hears, None for nothing ever."""

    class Connection(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            while self.request.recv(4096):
                if says is not None:
                    self.request.sendall(says)
                    return

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Connection) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield f"redis://127.0.0.1:{server.server_address[1]}/0?socket_timeout=0.1"
        server.shutdown()
        thread.join()


@contextmanager
def nobody() -> Iterator[str]:
    yield f"redis://127.0.0.1:{free_port()}/0"


SERVERS = {
    "none": nobody,
    "HTTP": partial(listening, b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n"),
    "hanging": partial(listening, None),
}


def test_each_command_tells_in_a_line_that_redis_cannot_be_asked() -> None:
    said = {}
    for name, server in SERVERS.items():
        with server() as url:
            # A mute one takes two seconds each.
            for command in COMMANDS[:: 2 if name == "hanging" else 1]:
                told = CliRunner().invoke(app, [*command.split(), "--redis-url", url])
                said[name, command] = (told.exit_code, told.stdout, told.stderr.count("\n"), told.stderr[:11])
    assert set(said.values()) == {(ExitCode.UNAVAILABLE, "", 1, "Redis could")}


def test_each_command_tells_that_a_password_is_wanted(tmp_path: Path) -> None:
    with RedisServer(tmp_path / "redis") as server:
        server.redis.config_set("requirepass", "hunter2")
        for command in COMMANDS:
            told = CliRunner().invoke(app, [*command.split(), "--redis-url", server.url])
            assert told.exit_code in (ExitCode.UNAVAILABLE, ExitCode.INVALID), command
            assert "authenticat" in told.stderr, command
            assert told.stdout == "", command
