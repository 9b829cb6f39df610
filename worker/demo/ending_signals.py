"""What a Ctrl-C, a `kill` and a closed terminal do to a process that has to clean up first."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Self

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Ended(BaseException):
    """A signal came."""


class EndingSignals:
    """A context manager, the outermost of a main thread: a signal that comes in it ends the process at its exit, as if
    nobody had caught it. Until then it is noted, so that it cuts off no cleaning up.
    """

    def __enter__(self) -> Self:
        self._came: int | None = None
        self._may_raise = False
        # Whoever has one ignored, as `nohup` does, means it.
        heard = [number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN]
        self._handlers = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._came is not None:
            with suppress(OSError):
                sys.stdout.flush()
            signal.signal(self._came, signal.SIG_DFL)
            os.kill(os.getpid(), self._came)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    @contextmanager
    def unwinding(self) -> Iterator[None]:
        """The first signal raises `Ended` in the body, also where it came before."""
        try:
            self._may_raise = True
            if self._came is not None:
                raise Ended
            yield
        finally:
            self._may_raise = False

    def _note(self, number: int, _: FrameType | None) -> None:
        is_first, self._came = self._came is None, self._came or number
        if is_first and self._may_raise:
            raise Ended
