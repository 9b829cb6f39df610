"""One thread keeps every lease of this process, and tells its holder when it is lost or the caller cancels.

Another hears at once of jobs being cancelled. What it misses, the next renewal finds out.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from redis import Redis
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from keye.config import keys
from keye.worker.leases.claims import Claimed
from keye.worker.leases.job_lease import Interruption, LeaseStore
from keye.worker.periodic_thread import PeriodicThread
from keye.worker.telemetry import metrics

log = logging.getLogger(__name__)

# Far more than are cancelled, on all workers together, between a claim and its holding.
HEARD_OF = 256

OnInterrupt = Callable[[Interruption], None]

REQUEUE_PATIENCE_SECONDS = 5.0

LISTEN_SECONDS = 0.5
PAUSE_SECONDS = 1.0
# Once nothing has come for its health check's interval the client asks for a sign of life with every look; that none
# comes it leaves to us to notice.
MAX_UNANSWERED = 8


class LeaseRenewal(PeriodicThread):
    """Renews at every third of the lease, so that two tries in a row may fail before anything is lost.

    Sooner where something may have happened to a job: whatever it was, renewing tells. To be stopped after the last
    job: a drain may outlast a lease.
    """

    def __init__(self, store: LeaseStore) -> None:
        super().__init__("renewal", store.lease_seconds / 3)
        self._store = store
        self._held: dict[Claimed, OnInterrupt] = {}
        # The newest jobs that `hurry` named and nobody here held.
        self._heard_of: deque[str] = deque(maxlen=HEARD_OF)
        self._lock = threading.Lock()
        self._is_drained = False
        self._renewed_at = time.monotonic()

    def turn(self) -> None:
        """One round trip for all. Where Redis is away jobs go on: what became of their leases is settle's to say."""
        held, now = list(self.held), time.monotonic()
        answers = self._store.renew(held)
        # Only those that came: while Redis is away none does, and that is told by other figures.
        if held and now - self._renewed_at > 2 * self.period_seconds:
            metrics.LATE_RENEWALS.inc()
        for lease, answer in zip(held, answers, strict=True):
            if answer != "renewed":
                self._interrupt(lease, answer)
        self._renewed_at = now

    def hurry(self, job_id: str | None) -> None:
        """Renew now if the job is one of ours: its caller may have cancelled it. None means any job."""
        with self._lock:
            is_ours = any(lease.job_id == job_id for lease in self._held)
            if not is_ours and job_id is not None:
                self._heard_of.append(job_id)
        if is_ours or job_id is None:
            self.wake()

    @property
    def held(self) -> set[Claimed]:
        with self._lock:
            return set(self._held)

    def drain(self) -> None:
        """Time is up: requeue every job that is held, and every one from now on, and wait for Redis no longer."""
        with self._lock:
            self._is_drained = True
            held = list(self._held)
        self._requeue(held)
        self._store.patience.end()

    @contextmanager
    def holding(self, lease: Claimed, on_interrupt: OnInterrupt) -> Iterator[None]:
        """Keep `lease` while the body runs.

        `on_interrupt` is called from the renewal's thread: with "lost" once, with "cancelled" at every renewal; and
        with "drained", once the job is requeued, from that of `drain` or here.
        """
        with self._lock:
            self._held[lease] = on_interrupt
            is_too_late = self._is_drained
            was_heard_of = lease.job_id in self._heard_of
        if is_too_late:
            self._requeue([lease])
        if was_heard_of:
            # Between its claim and this line the job was not known as ours to `hurry`.
            self.wake()
        try:
            yield
        finally:
            with self._lock:
                self._held.pop(lease, None)

    def _requeue(self, leases: list[Claimed]) -> None:
        try:
            answers = self._store.patience.wait_out(
                lambda: self._store.requeue(leases), "giving jobs back", REQUEUE_PATIENCE_SECONDS
            )
        except RedisError as fault:
            log.error("%d jobs not given back, others run them once their leases end: %s", len(leases), fault)
            answers = ["lost" for _ in leases]
        for lease, answer in zip(leases, answers, strict=True):
            self._interrupt(lease, "drained" if answer == "queued" else answer)

    def _interrupt(self, lease: Claimed, reason: Interruption) -> None:
        with self._lock:
            on_interrupt = self._held.get(lease)
            if reason != "cancelled":
                self._held.pop(lease, None)
        # It may have ended meanwhile.
        if on_interrupt is not None:
            on_interrupt(reason)


class CancelListener(PeriodicThread):
    """Calls `on_cancel` with the id of every job that is cancelled while it runs, whoever runs it.

    And with None whenever it begins to listen, after a lost connection too: some may have been missed.
    """

    def __init__(self, redis: Redis, on_cancel: Callable[[str | None], None]) -> None:
        super().__init__("cancel-listener", PAUSE_SECONDS)
        self._redis = redis
        self._on_cancel = on_cancel
        self._is_listening = True
        self.wake()

    def turn(self) -> None:
        """Listens until the connection breaks."""
        try:
            with self._redis.pubsub() as notices:
                notices.subscribe(keys.CANCELLATIONS)
                while not self.is_stopping:
                    match notices.get_message(timeout=LISTEN_SECONDS):
                        case {"type": "subscribe"}:
                            self._is_listening = True
                            self._on_cancel(None)
                        case {"type": "message", "data": job_id}:
                            self._on_cancel(job_id)
                    if notices.health_check_response_counter > MAX_UNANSWERED:
                        raise RedisTimeoutError("the connection is silent")
        except (RedisError, UnicodeDecodeError) as fault:
            # Once an outage, which may be long. Anybody may publish what is no text.
            if self._is_listening:
                log.warning("not listening for cancellations for a moment: %s", fault)
            self._is_listening = False
