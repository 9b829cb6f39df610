"""A thread that does something every so often, and goes on whatever happens: nobody would notice where it ended."""

import logging
import threading

from redis import RedisError

log = logging.getLogger(__name__)


class PeriodicThread:
    """Takes a `turn` every `period_seconds`, and at once after `wake`, until `stop`; never two at a time.

    A fault is logged, that of a Redis that is away in one line, and the next turn comes.
    """

    def __init__(self, name: str, period_seconds: float) -> None:
        self.period_seconds = period_seconds
        self.is_stopping = False
        self._is_woken = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """The first turn is taken a period later."""
        self._thread.start()

    def wake(self) -> None:
        """Take the next turn now."""
        self._is_woken.set()

    def stop(self) -> None:
        """Waits for the turn that is being taken; no other follows."""
        self.is_stopping = True
        self.wake()
        self._thread.join()

    def turn(self) -> None:
        raise NotImplementedError

    def _run(self) -> None:
        while True:
            self._is_woken.wait(self.period_seconds)
            self._is_woken.clear()
            if self.is_stopping:
                return
            try:
                self.turn()
            except RedisError as fault:
                log.warning("%s: %s, next try in %g s", self._thread.name, fault, self.period_seconds)
            except Exception:
                log.exception("%s: a fault of its own, going on", self._thread.name)
