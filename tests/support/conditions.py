"""Waiting for what has to come about, however busy the machine is."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def eventually(look: Callable[[], T], within_seconds: float = 30) -> T:
    """What `look` says once it is true; fails when it never is."""
    end = time.monotonic() + within_seconds
    while not (seen := look()):
        assert time.monotonic() < end, f"not within {within_seconds} s, last seen: {seen!r}"
        time.sleep(0.02)
    return seen
