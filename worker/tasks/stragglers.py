"""Attempts that outlive their time because nothing of ours runs in their thread: their jobs are ended from outside."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from redis.exceptions import RedisError

from keye.config.job import AnalysisJob
from keye.worker.leases.job_lease import Claimed
from keye.worker.results.settlement import Settlement
from keye.worker.tasks.attempt import Attempt
from keye.worker.tasks.fault import failure_of

log = logging.getLogger(__name__)

# Every stage that looks at the clock has ended by then.
GRACE_SECONDS = 3.0


@dataclass(eq=False, slots=True)
class _Watched:
    attempt: Attempt
    lease: Claimed
    job: AnalysisJob
    is_ended: bool = False


class Stragglers:
    """Attempts are watched from their own threads and ended from one other."""

    def __init__(self, settlement: Settlement) -> None:
        self._settlement = settlement
        self._running: set[_Watched] = set()

    @contextmanager
    def watching(self, attempt: Attempt, lease: Claimed, job: AnalysisJob) -> Iterator[None]:
        watched = _Watched(attempt, lease, job)
        self._running.add(watched)
        try:
            yield
        finally:
            self._running.discard(watched)

    def end_overdue(self) -> dict[Claimed, float]:
        """End the jobs whose time is over; returns those whose threads run on, and for how many seconds beyond it."""
        now = time.monotonic()
        # Copied in one move: threads come and go.
        seconds_over = {watched: now - watched.attempt.ends_at for watched in self._running.copy()}
        overdue = {watched: seconds for watched, seconds in seconds_over.items() if seconds > GRACE_SECONDS}
        try:
            for watched in overdue:
                self._end(watched)
        except RedisError as error:
            log.warning("%d jobs hang and cannot be ended while Redis is away: %s", len(overdue), error)
        return {watched.lease: seconds for watched, seconds in overdue.items()}

    def _end(self, watched: _Watched) -> None:
        fault = watched.attempt.fault_of_time()
        if watched.is_ended or fault is None:
            return
        failure = failure_of(fault, watched.attempt.stage, watched.lease, watched.job)
        if self._settlement.settle(watched.lease, failure):
            why = (failure.stage, failure.code, failure.message)
            log.error("job %s: hangs in %s: %s: %r", watched.lease.job_id, *why)
        watched.is_ended = True
