"""Jobs of a process run side by side, but few whose worker died once; one that may have killed a worker runs alone."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Should their worker die too, they run alone, one after another. Of the 64 that an engine runs, the square root makes
# the time least in which all have run both ways.
MAX_COMPANY = 8
LOOK_SECONDS = 0.2


class Isolation:
    """A lock with room for any number of ordinary jobs, `MAX_COMPANY` of those whose worker died once among them, or
    for one suspect. Suspects go first, or they never would.
    """

    def __init__(self) -> None:
        lock = threading.Lock()
        self._changed = threading.Condition(lock)
        # Of its own: many may wait for it for long, while others come and go.
        self._company_changed = threading.Condition(lock)
        self._num_running = 0
        self._suspects: set[str] = set()
        # In the order in which they came: the first have a place.
        self._company: list[object] = []

    @contextmanager
    def beside_others(self) -> Iterator[None]:
        """Waits while a suspect waits or runs."""
        with self._changed:
            self._changed.wait_for(lambda: not self._suspects)
            self._num_running += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_running -= 1
                self._changed.notify_all()

    @contextmanager
    def in_company(self, check: Callable[[], None]) -> Iterator[None]:
        """Within `beside_others`: waits for a place among few like it, first come, first served.

        It neither begins while a suspect waits or runs, nor keeps one waiting before. `check` is called several times a
        second meanwhile; what it raises ends the wait.
        """
        member, has_begun = object(), False
        with self._changed:
            self._company.append(member)
            self._num_running -= 1
            self._changed.notify_all()
        try:
            while not (has_begun := self._begins(member)):
                check()
            yield
        finally:
            with self._changed:
                self._company.remove(member)
                # Or `beside_others` would count it out twice.
                self._num_running += not has_begun
                self._company_changed.notify_all()

    def _begins(self, member: object) -> bool:
        """Whether it has its turn within a moment, and counts as running from now on."""
        with self._company_changed:
            begins = self._company_changed.wait_for(
                lambda: not self._suspects and member in self._company[:MAX_COMPANY], LOOK_SECONDS
            )
            self._num_running += begins
        return begins

    @contextmanager
    def alone(self, job_id: str) -> Iterator[bool]:
        """Waits until nothing runs; False, at once, where the same job waits here already by another delivery."""
        with self._changed:
            is_first = job_id not in self._suspects
            if is_first:
                self._suspects.add(job_id)
                self._changed.wait_for(lambda: not self._num_running)
                self._num_running += 1
        try:
            yield is_first
        finally:
            if is_first:
                with self._changed:
                    self._num_running -= 1
                    self._suspects.remove(job_id)
                    self._changed.notify_all()
                    self._company_changed.notify_all()
