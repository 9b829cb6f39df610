"""What a decoder child prints, brought to the worker's log: the child may grow no file, and a log may be one."""

import os
import re
from contextlib import suppress

# Of the newest: the traceback of what ended a child stands at the end.
_MAX_BYTES = 16 * 2**10
_CONTROL = re.compile(r"[^\n\x20-\x7e\xa0-\uffff]")


class Printed:
    """A pipe that holds up neither end: what finds no room in it until the next `keep` is lost to the child."""

    def __init__(self) -> None:
        self._ours, self.theirs = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._kept = b""

    def close(self) -> None:
        os.close(self._ours)

    def keep(self) -> None:
        with suppress(BlockingIOError):
            # A pipe's worth, and no more however fast it is filled.
            self._kept = (self._kept + os.read(self._ours, 2**16))[-_MAX_BYTES:]

    def take(self) -> str:
        """What was kept since the last call, on lines that no reader of the log mistakes for others."""
        self.keep()
        text, self._kept = self._kept.decode(errors="backslashreplace"), b""
        clean = _CONTROL.sub(lambda found: repr(found[0])[1:-1], text.strip())
        return clean and "    " + clean.replace("\n", "\n    ")
