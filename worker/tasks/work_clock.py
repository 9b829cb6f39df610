"""How much of a worker's time each kind of job takes, measured while jobs run side by side."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from redis import Redis

from keye.config import keys
from keye.config.scripts import load_script


class WorkClock:
    """Time is shared out: of every second that n jobs run, each is charged an n-th. So what jobs are charged adds up to
    the time that the worker was busy, and tells how long a queue of them will take.

    A job that ran in little company is charged more than it would be among others: it counts the less, the further the
    worker was from `concurrency`.
    """

    def __init__(self, redis: Redis, concurrency: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._hand_on = load_script(redis, "work")
        self._concurrency = concurrency
        self._clock = clock
        self._lock = threading.Lock()
        self._num_running = 0
        self._charged_each = 0.0
        self._charged_at = clock()
        # Of each kind: jobs, the sum of their weights, and of what they were charged times their weights.
        self._measured: dict[str, tuple[int, float, float]] = {}

    @contextmanager
    def running(self, kind: str) -> Iterator[None]:
        """A job runs in the body. It is measured only where that ends without an exception."""
        began_at, before = self._clock(), self._turn(1)
        try:
            yield
        except BaseException:
            self._turn(-1)
            raise
        charged = self._turn(-1) - before
        lasted = self._clock() - began_at
        weight = min(1.0, lasted / charged / self._concurrency) if charged > 0 else 0.0
        with self._lock:
            num, weights, total = self._measured.get(kind, (0, 0.0, 0.0))
            self._measured[kind] = num + 1, weights + weight, total + weight * charged

    def hand_on(self) -> None:
        """What was measured since the last time, into the hash of all workers. Raises Redis' fault, and forgets it."""
        with self._lock:
            measured, self._measured = self._measured, {}
        if measured:
            self._hand_on([keys.WORK], [part for kind, sums in measured.items() for part in (kind, *sums)])

    def _turn(self, change: int) -> float:
        """Jobs come and go: what each was charged so far, had it run from the beginning."""
        with self._lock:
            now = self._clock()
            if self._num_running:
                self._charged_each += (now - self._charged_at) / self._num_running
            self._charged_at = now
            self._num_running += change
            return self._charged_each
