"""Jobs of a process run side by side; one that may have killed a worker runs alone."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Isolation:
    """A lock with room for any number of ordinary jobs, or for one suspect. Suspects go first, or they never would."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._num_running = 0
        self._suspects: set[str] = set()

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
    def alone(self, job_id: str) -> Iterator[bool]:
        """Waits until nothing runs; False, at once, where the same job waits here already by another delivery."""
        with self._changed:
            is_first = job_id not in self._suspects
            if is_first:
                self._suspects.add(job_id)
                self._changed.wait_for(lambda: not self._num_running)
                self._num_running = 1
        try:
            yield is_first
        finally:
            if is_first:
                with self._changed:
                    self._num_running = 0
                    self._suspects.remove(job_id)
                    self._changed.notify_all()
