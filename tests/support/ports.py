"""Ports for servers that have to be told one."""

import random
import socket


def free_port() -> int:
    """One that neither another server nor the kernel is likely to take while ours is not there."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
