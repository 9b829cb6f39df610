"""One thread per worker that looks after jobs nobody has: of dead workers, due again, without message, too late."""

import logging
import threading
from collections.abc import Callable

from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from config import keys
from worker.leases.job_lease import LateJob, LeaseStore, Requeued, TakenOver

log = logging.getLogger(__name__)

MAX_JOBS_PER_PASS = 100


class Reaper:
    """Looks for overdue leases, lost messages and passed deadlines; of all workers one does at a time.

    `publish` gives a requeued job its message, `bury` settles one that was taken over, `expire` ends a late one unless
    a worker has it. What fails is tried again: of a lease, once the reaper's own hold on the job has run out.
    """

    def __init__(
        self,
        store: LeaseStore,
        worker: str,
        publish: Callable[[Requeued], None],
        bury: Callable[[TakenOver], None],
        expire: Callable[[LateJob], None],
    ) -> None:
        self._store = store
        self._worker = worker
        self._publish = publish
        self._bury = bury
        self._expire = expire
        # A dead worker's jobs start again within the lease and two of these.
        self._interval_seconds = store.lease_seconds / 15
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lease-reaper", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def look_around(self) -> None:
        """All there is to do, once; raises `RedisError` where Redis is away."""
        for late in self._store.late(limit=MAX_JOBS_PER_PASS):
            self._expire(late)
        for job_id in self._store.sweep(limit=MAX_JOBS_PER_PASS):
            log.warning("job %s: its message was lost, queued again", job_id)
        self.reap_overdue()

    def reap_overdue(self) -> None:
        """Take every overdue job from its dead holder; raises `RedisError` where Redis is away."""
        for job_id in self._store.overdue(limit=MAX_JOBS_PER_PASS):
            match self._store.reap(job_id, self._worker):
                case Requeued() as requeued:
                    if requeued.dead_worker is not None:
                        log.warning("job %s: its worker %s died, queued again", job_id, requeued.dead_worker)
                    self._publish(requeued)
                    self._store.confirm_published(requeued)
                case TakenOver() as taken:
                    log.error("job %s: its worker %s died, it may not run again", job_id, taken.dead_worker)
                    self._bury(taken)

    def _run(self) -> None:
        pause = self._interval_seconds
        while not self._stopping.wait(pause):
            try:
                # The lock is the turn: it runs out by itself just before the next one is due.
                turn_ms = int(self._interval_seconds * 800)
                if self._store.redis.set(keys.reaper_turn(), self._worker, nx=True, px=turn_ms):
                    self.look_around()
                pause = self._interval_seconds
            except (RedisError, OperationalError) as fault:
                # After an outage every lease is overdue: first let the living renew theirs.
                pause = self._store.lease_seconds
                log.warning("reaper: Redis is away (%s), looking again in %.0f s", fault, pause)
            except Exception:
                # A dead reaper would be noticed only by those who wait for ever.
                log.exception("reaper: a fault of its own, going on")
