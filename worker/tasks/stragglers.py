"""Attempts that outlive their time because nothing of ours runs in their thread: their jobs are ended from outside."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from redis.exceptions import RedisError

from keye.worker.leases.job_lease import Claimed
from keye.worker.results.settlement import Settlement
from keye.worker.tasks.attempt import Attempt
from keye.worker.tasks.fault import failure_of

log = logging.getLogger(__name__)

# Every stage that looks at the clock has ended by then.
GRACE_SECONDS = 3.0


class Stragglers:
    """Attempts are watched from their own threads and ended from one other."""

    def __init__(self, settlement: Settlement) -> None:
        self._settlement = settlement
        self._running: set[Attempt] = set()
        self._ended: set[Attempt] = set()

    @contextmanager
    def watching(self, attempt: Attempt) -> Iterator[None]:
        self._running.add(attempt)
        try:
            yield
        finally:
            self._running.discard(attempt)
            self._ended.discard(attempt)

    def end_overdue(self) -> dict[Claimed, float]:
        """End the jobs whose time is over; returns those whose threads run on, and for how many seconds beyond it."""
        now = time.monotonic()
        # Copied in one move: threads come and go.
        seconds_over = {attempt: now - attempt.ends_at for attempt in self._running.copy()}
        overdue = {attempt: seconds for attempt, seconds in seconds_over.items() if seconds > GRACE_SECONDS}
        try:
            for attempt in overdue.keys() - self._ended:
                self._end(attempt)
        except RedisError as error:
            log.warning("%d jobs hang and cannot be ended while Redis is away: %s", len(overdue), error)
        return {attempt.lease: seconds for attempt, seconds in overdue.items()}

    def _end(self, attempt: Attempt) -> None:
        if (fault := attempt.fault_of_time()) is None:
            return
        failure = failure_of(fault, attempt.stage, attempt.lease, attempt.job)
        if self._settlement.settle(attempt.lease, failure):
            why = (failure.stage, failure.code, failure.message)
            log.error("job %s: hangs in %s: %s: %r", attempt.lease.job_id, *why)
        self._ended.add(attempt)
