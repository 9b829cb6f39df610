"""How far preparing runs ahead of generating: what each attempt of this process is at, and whether another is taken."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from keye.worker.tasks.attempt import Attempt, Phase

# From the message on: what takes no longer will soon wait for a decoder, or for the engine.
BRIEFLY_SECONDS = 0.1


def most_waiting(num_decoders: int) -> int:
    """Jobs that may wait for a decoder, or generations for the engine: whoever takes from them finds the next."""
    return max(8, 2 * num_decoders)


def most_fetching(num_decoders: int) -> int:
    """Jobs that may be on their way to a decoder: a store takes its time, but neither memory nor a core."""
    return 2 * most_waiting(num_decoders)


def most_unprepared(num_decoders: int) -> int:
    """Jobs that may hold open files and threads for their media."""
    return most_fetching(num_decoders) + most_waiting(num_decoders) + num_decoders


class Lookahead:
    """The attempts of this process: each is noted from its own thread, and they are counted from the door's.

    Another message is taken only while the decoders, or the engine, can soon have what it asks for. Whoever would wait
    longer is left to other workers. `wake` has the door look again.
    """

    def __init__(self, num_decoders: int) -> None:
        self._num_decoders = num_decoders
        self._most_waiting = most_waiting(num_decoders)
        self._most_fetching = most_fetching(num_decoders)
        self._running: set[Attempt] = set()
        # Of these, those that the engine has not begun with: few, and looked at often.
        self._ahead: set[Attempt] = set()
        self._has_refused = False
        self.wake: Callable[[], None] = lambda: None

    @contextmanager
    def watching(self, attempt: "Attempt") -> Iterator[None]:
        self._running.add(attempt)
        self._ahead.add(attempt)
        try:
            yield
        finally:
            self._running.discard(attempt)
            self.begun(attempt)

    def begun(self, attempt: "Attempt") -> None:
        """The engine has with it, or it has ended."""
        self._ahead.discard(attempt)
        self.changed()

    def attempts(self) -> "set[Attempt]":
        """Copied in one move: threads come and go."""
        return self._running.copy()

    def phases(self) -> "list[Phase]":
        """Of each attempt; one that waits for the engine is there once for each generation that does."""
        phases = {attempt: attempt.phase for attempt in self.attempts()}
        return [phase for each, phase in phases.items() for _ in range(each.num_waiting if phase == "engine" else 1)]

    def changed(self) -> None:
        """An attempt is at something else now."""
        if self._has_refused:
            self._has_refused = False
            self.wake()

    def has_room(self, num_taken: int) -> bool:
        """Whether another message is to be taken; `num_taken` have been, and are not acknowledged yet."""
        self._has_refused = True
        ahead = self._ahead.copy()
        phases = [attempt.phase for attempt in ahead]
        num_unclaimed = num_taken - len(self._running)
        num_new = sum(a.phase == "fetch" and a.seconds < BRIEFLY_SECONDS for a in ahead) + num_unclaimed
        # Who is about to ask for a decoder seems to have one.
        num_for_engine = sum(a.num_waiting for a, phase in zip(ahead, phases, strict=True) if phase == "engine")
        num_asking = max(0, phases.count("decode") - self._num_decoders)
        has_room = (
            phases.count("fetch") + num_unclaimed < self._most_fetching
            and phases.count("decoder") + num_asking + num_new < self._most_waiting
            and num_for_engine + num_new < self._most_waiting
            and "memory" not in phases
        )
        self._has_refused = not has_room
        return has_room
