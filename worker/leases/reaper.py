"""One thread per worker that looks after jobs nobody has: of dead workers, due again, without message, too late."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from redis.exceptions import NoPermissionError, RedisError

from keye.config import keys
from keye.config.codes import ErrorCode, JobState
from keye.config.connection import passes
from keye.config.presence import EXPIRY_SECONDS
from keye.config.wire import traceparent_of
from keye.worker.leases.claims import LateJob, Requeued, TakenOver
from keye.worker.leases.job_lease import LeaseStore
from keye.worker.leases.server_clock import ServerClock, rebase
from keye.worker.periodic_thread import PeriodicThread
from keye.worker.telemetry import metrics
from keye.worker.telemetry.log import about

log = logging.getLogger(__name__)

MAX_JOBS_PER_PASS = 100


class Reaper(PeriodicThread):
    """Looks for overdue leases, lost messages and passed deadlines; of all workers one does at a time.

    `deliver` write what Redis could not take of this process or host, each time and whoever's turn it is.
    `dead_letter` settles a job that was taken over, `expire` ends a late one unless a worker has it. A job that cannot
    be looked after does not hold up the others: it is logged, and tried again a lease later.
    """

    def __init__(
        self,
        store: LeaseStore,
        worker: str,
        deliver: Sequence[Callable[[], None]],
        dead_letter: Callable[[TakenOver], None],
        expire: Callable[[LateJob], None],
    ) -> None:
        # A dead worker's jobs start again within the lease and two of these.
        super().__init__("reaper", store.lease_seconds / 15)
        self._store = store
        self._worker = worker
        self._deliver = deliver
        self._dead_letter = dead_letter
        self._expire = expire
        self._is_away = False
        self._first_shared = 0
        self._missed: list[str] = []
        self._clock = ServerClock(tolerance_seconds=self.period_seconds)
        # What happened before is not known: the clock may have been set back, or forward a moment ago, in which case
        # the living renew their leases within a third of them.
        self._must_rebase = True
        self._tidies_at = 0.0
        self._looks_at = time.monotonic() + store.lease_seconds / 3 + self.period_seconds

    def turn(self) -> None:
        try:
            for deliver in self._deliver:
                deliver()
            self._look_around_if_first()
        except RedisError as fault:
            if not self._is_away:
                log.warning("reaper: Redis is away (%s), looking around a lease after it is back", fault)
            self._is_away = True

    def _look_around_if_first(self) -> None:
        # A turn runs out by itself just before the next one is due.
        asked_at = time.monotonic()
        has_turn, now = self._store.take_turn(self._worker, 0.8 * self.period_seconds)
        answered_at = time.monotonic()
        step = self._clock.read(now, asked_at, answered_at)
        if step > 0 or self._is_away or self._must_rebase:
            # Who is alive says so again only now.
            self._tidies_at = answered_at + EXPIRY_SECONDS
        if step > 0 or self._is_away:
            # Every lease is overdue: first let the living renew theirs, and settle.
            self._is_away, self._looks_at = False, answered_at + self._store.lease_seconds
        if step > 0:
            wait = self._store.lease_seconds
            log.warning("reaper: Redis' clock was set forward by %.1f s, looking around in %g s", step, wait)
        elif step < 0:
            log.warning("reaper: Redis' clock was set back by %.1f s, leases and queues count from now", -step)
            self._must_rebase = True
        if self._must_rebase:
            rebase(self._store.redis, self._store.lease_seconds)
            self._must_rebase = False
        if has_turn and answered_at >= self._looks_at:
            self.look_around()

    def look_around(self) -> None:
        """All there is to do, once; raises `RedisError` where Redis is away."""
        for job_id in self._store.due(keys.DEADLINES, limit=MAX_JOBS_PER_PASS):
            with self._sparing_the_others(job_id, keys.DEADLINES):
                self._expire(self._store.read_late(job_id))
        lost, self._missed = self._store.sweep(MAX_JOBS_PER_PASS, self._missed)
        for job_id in lost:
            log.warning("job %s: its message was lost, queued again", job_id, extra={"job_id": job_id})
        self._adopt()
        self.reap_overdue()
        if time.monotonic() >= self._tidies_at:
            self._store.tidy(limit=MAX_JOBS_PER_PASS)

    def _adopt(self) -> None:
        try:
            num_adopted, self._first_shared = self._store.adopt(self._first_shared)
        except NoPermissionError:
            # Who grants us nothing of what all Celery apps share has no workers of 0.2.
            return
        if num_adopted:
            log.warning("%d messages that workers of 0.2 had taken are handed out again", num_adopted)

    def reap_overdue(self) -> None:
        """Take every overdue job from its dead holder; raises `RedisError` where Redis is away.

        Gives up its turn for now when that takes long: thousands may wait here for another attempt or a newer worker.
        """
        gives_up_at = time.monotonic() + self.period_seconds / 2
        while overdue := self._store.due(keys.LEASES, MAX_JOBS_PER_PASS, self._clock.latest):
            for job_id in overdue:
                with self._sparing_the_others(job_id, keys.LEASES):
                    self._reap(job_id)
            if time.monotonic() > gives_up_at:
                return

    def _reap(self, job_id: str) -> None:
        match self._store.reap(job_id, self._worker, self._clock.latest):
            case Requeued() as requeued:
                if requeued.dead_worker is not None:
                    metrics.REAPED.inc()
                    with about(traceparent=traceparent_of(requeued.sealed_json), attempt=requeued.attempt):
                        told = {"state": JobState.QUEUED, "stage": requeued.stage, "code": ErrorCode.WORKER_LOST}
                        log.warning(
                            "job %s: its worker %s died in %s, attempt %d, queued again: %s",
                            *(job_id, requeued.dead_worker, requeued.stage, requeued.attempt, ErrorCode.WORKER_LOST),
                            extra=told,
                        )
                self._store.publish(requeued)
            case TakenOver() as taken:
                metrics.REAPED.inc()
                with about(traceparent=traceparent_of(taken.lease.sealed_json), attempt=taken.lease.attempt):
                    log.error(
                        "job %s: its worker %s died in %s, attempt %d, it may not run again: %s",
                        *(job_id, taken.dead_worker, taken.stage, taken.lease.attempt, ErrorCode.WORKER_LOST),
                        extra={"stage": taken.stage, "code": ErrorCode.WORKER_LOST},
                    )
                    self._dead_letter(taken)

    @contextmanager
    def _sparing_the_others(self, job_id: str, found_in: str) -> Iterator[None]:
        try:
            with about(job_id=job_id):
                yield
        except Exception as fault:
            if isinstance(fault, RedisError) and passes(fault):
                raise
            log.exception("job %s: cannot be looked after, again in %g s", job_id, self._store.lease_seconds)
            self._store.postpone(job_id, found_in)
