"""Whether an attempt waits for its turn, and what for: a worker that dies meanwhile did not die of it."""

import threading
import time
from collections.abc import Callable
from typing import Literal

from keye.worker.leases.claims import Claimed
from keye.worker.results.event_writer import EventWriter

# A shorter wait is not worth two round trips.
BRIEF_WAIT_SECONDS = 0.1


# A place among few whose worker died once, a decoder, room for its pixels, or room in the engine.
Wanted = Literal["company", "decoder", "memory", "engine"]


class Turn:
    """It waits once a thread has called `wait`, until one calls `begin`; with several threads, while all of them wait.
    One whose lease says so waits from its start, until one calls `come`.

    The job's record says so where the wait is not brief. `on_change` is called whenever it begins to wait, or to act.
    """

    def __init__(self, events: EventWriter, lease: Claimed, on_change: Callable[[], None]) -> None:
        self._events = events
        self._lease = lease
        self._on_change = on_change
        # Held while it is written: nobody begins before the record says so.
        self._lock = threading.Lock()
        self._have_begun: set[int] = set()
        self._wanted: Wanted = "company" if lease.waits else "decoder"
        self._waits_since: float | None = time.monotonic() if lease.waits else None
        self._is_told = lease.waits

    @property
    def waits_for(self) -> Wanted | None:
        return None if self._waits_since is None else self._wanted

    def wait(self, wanted: Wanted) -> None:
        """What this thread sees to waits."""
        self._wanted = wanted
        self.end()

    def end(self) -> None:
        """What this thread saw to has ended."""
        with self._lock:
            self._have_begun.discard(threading.get_ident())
            if not self._have_begun and self._waits_since is None:
                self._waits_since = time.monotonic()
        self._on_change()

    def begin(self) -> None:
        """What this thread sees to begins, once this returns."""
        with self._lock:
            self._have_begun.add(threading.get_ident())
            self._end_wait()
        self._on_change()

    def come(self) -> None:
        """What the attempt waited for from its claim on has come, and nothing has begun yet."""
        with self._lock:
            self._end_wait()
            self._wanted = "decoder"
        self._on_change()

    def _end_wait(self) -> None:
        self._waits_since = None
        if self._is_told:
            self._is_told = False
            self._events.write_waits(self._lease, False)

    def tell(self, after_seconds: float = BRIEF_WAIT_SECONDS) -> None:
        """To be called while it may wait, several times a second: that it has waited for so long is written once."""
        with self._lock:
            if self._is_told or self._waits_since is None:
                return
            if time.monotonic() - self._waits_since >= after_seconds:
                self._is_told = True
                self._events.write_waits(self._lease, True)
