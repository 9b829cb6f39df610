"""Redis' clock beside our own, which nobody sets: whether that one was set, and what lies in its future put right."""

import math
import time
from itertools import chain

from redis import Redis

from keye.config import keys
from keye.config.job import Priority
from keye.config.scripts import load_script
from keye.config.topology import UNACKED_MUTEX

# Of leases, and of the jobs of each queue, in one script: some milliseconds.
REBASED_AT_ONCE = 500


class ServerClock:
    """How far it is ahead of ours is known within the time that an answer takes, and better with every reading."""

    def __init__(self, tolerance_seconds: float) -> None:
        self._tolerance_seconds = tolerance_seconds
        self._least_ahead, self._most_ahead = -math.inf, math.inf

    @property
    def latest(self) -> float:
        """The most that it can show now (Unix seconds), unless it was set since it was read last."""
        return time.monotonic() + self._most_ahead

    def read(self, shown: float, asked_at: float, answered_at: float) -> float:
        """By how many seconds at least it was set since the last reading, below 0 if back.

        0.0 where nothing says so, and up to the tolerance: clocks are slewed, and a little harms no lease. `shown` is
        what it showed between two moments of `time.monotonic`.
        """
        least, most = shown - answered_at, shown - asked_at
        step = max(0.0, least - self._most_ahead) + min(0.0, most - self._least_ahead)
        if step:
            self._least_ahead, self._most_ahead = least, most
        else:
            self._least_ahead, self._most_ahead = max(least, self._least_ahead), min(most, self._most_ahead)
        return step if abs(step) > self._tolerance_seconds else 0.0


def rebase(redis: Redis, lease_seconds: float) -> None:
    """What lies in the future because the clock was set back counts from now; twice is as good as once.

    `lease_seconds` are those of workers of 0.2, whose records do not say it.
    """
    # kombu's, whose holder may have died. Should two look at once for what is not acknowledged, no harm is done.
    redis.delete(UNACKED_MUTEX)
    script = load_script(redis, "rebase")
    names = [keys.LEASES, keys.TAKEN, keys.record("")]
    names += chain.from_iterable((keys.queued(priority), keys.unheard(priority)) for priority in Priority)
    passed_over, looked_at = 0, REBASED_AT_ONCE
    while looked_at == REBASED_AT_ONCE:
        num_leases, num_left, num_queued = script(names, [lease_seconds, passed_over, REBASED_AT_ONCE])
        passed_over, looked_at = passed_over + num_left, max(num_leases, num_queued)
