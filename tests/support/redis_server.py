"""Debian's Redis and its Sentinel, for what the embedded Valkey lacks: TLS, failovers, servers of an older kind."""

import shutil
import socket
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from redis import Redis
from redis.exceptions import RedisError

from tests.support.conditions import eventually
from tests.support.debian import need
from tests.support.ports import free_port


class RedisServer:
    """A context manager: append-only, never evicts, answers once entered; comes back on its port with what it had."""

    def __init__(self, folder: Path, *options: object) -> None:
        self._program = need("redis-server")
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.port, self.tls_port = free_port(), free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._options = ["--port", self.port, "--dir", folder, "--save", "", "--appendonly", "yes", *options]
        self.redis = Redis(port=self.port, decode_responses=True, socket_timeout=60)

    def __enter__(self) -> Self:
        self.start()
        return self

    def start(self, *options: object) -> None:
        command = [self._program, *map(str, [*self._options, *options])]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        eventually(self._answers)

    def _answers(self) -> bool:
        assert self._process.poll() is None, (self.folder / "log").read_text()
        try:
            return bool(self.redis.ping())
        except RedisError as fault:
            # It has a password by now.
            return "NOAUTH" in str(fault) or "Authentication" in str(fault)

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._process.wait()

    def __exit__(self, *_: object) -> None:
        self.redis.close()
        self.kill()


class Sentinels:
    """A context manager: so many watch a server, under a name, and agree by majority; each knows the others."""

    def __init__(
        self, folder: Path, port: int, name: str, options: Iterable[str] = (), num: int = 3, tls: bool = False
    ) -> None:
        """`options` are further lines of their settings; with `tls` they speak nothing else."""
        self._program = need("redis-sentinel")
        self.name = name
        self.ports = [free_port() for _ in range(num)]
        self._files = []
        for sentinel_port in self.ports:
            lines = [
                f"port 0\ntls-port {sentinel_port}" if tls else f"port {sentinel_port}",
                *options,
                f"sentinel monitor {name} 127.0.0.1 {port} {num // 2 + 1}",
                f"sentinel down-after-milliseconds {name} 1000",
                f"sentinel failover-timeout {name} 10000",
            ]
            home = folder / str(sentinel_port)
            shutil.rmtree(home, ignore_errors=True)
            home.mkdir(parents=True)
            (home / "sentinel.conf").write_text("\n".join([*lines, f"dir {home}", ""]))
            self._files.append(home / "sentinel.conf")

    def __enter__(self) -> Self:
        self._processes = [subprocess.Popen([self._program, file], stdout=subprocess.DEVNULL) for file in self._files]
        eventually(lambda: all(map(_listens, self.ports)))
        return self

    @property
    def hosts(self) -> str:
        """As they stand in a URL."""
        return ",".join(f"127.0.0.1:{port}" for port in self.ports)

    @property
    def url(self) -> str:
        return f"sentinel://{self.hosts}/{self.name}/0"

    def ask(self, *command: str) -> Any:
        """The answer of the first."""
        with Redis(port=self.ports[0], decode_responses=True) as sentinel:
            return sentinel.execute_command("SENTINEL", *command)

    def all_know(self, num_replicas: int) -> bool:
        """Of each other, and of so many replicas."""
        for port in self.ports:
            with Redis(port=port) as sentinel:
                try:
                    told: Any = sentinel.execute_command("SENTINEL MASTER", self.name)
                except RedisError:
                    return False
                if told["num-slaves"] < num_replicas or told["num-other-sentinels"] < len(self.ports) - 1:
                    return False
        return True

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
