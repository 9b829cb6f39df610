"""A command in a terminal of its own, and somebody who reads and types there."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Self

from tests.support.conditions import eventually

# The command `keye` of this checkout.
KEYE = (sys.executable, "-P", "-c", "from keye.producer.cli import app; app()")

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_HOME = "\x1b[H"


class Terminal:
    """A context manager; what still runs at its end is killed."""

    def __init__(
        self,
        command: Sequence[str],
        environ: Mapping[str, str],
        columns: int = 60,
        rows: int = 20,
        stop_at: str | None = None,
    ) -> None:
        """Nobody reads on behind `stop_at` until `read_on`: the command has to wait there soon."""
        self._stop_at, self._reads_on = stop_at, threading.Event()
        self._ours, theirs = pty.openpty()
        self.settings = termios.tcgetattr(theirs)
        self.resize(columns, rows)
        # setsid: the terminal's own Ctrl-C reaches whoever it belongs to.
        self.process = subprocess.Popen(
            ["setsid", "--ctty", *command], env={**environ, "TERM": "xterm"}, stdin=theirs, stdout=theirs, stderr=theirs
        )
        self._theirs = theirs
        self._said = b""
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with suppress(OSError):  # the other end is closed
            while piece := os.read(self._ours, 1024):
                self._said += piece
                if self._stop_at and self._stop_at in self.said:
                    self._reads_on.wait()

    def read_on(self) -> None:
        self._reads_on.set()

    @property
    def said(self) -> str:
        """All of it, control sequences too."""
        return self._said.decode(errors="replace")

    @property
    def screen(self) -> list[str]:
        """The lines of what was drawn last and whole, from the corner on; of who never goes there, all lines."""
        drawn = self.said.split(_HOME)
        return _CONTROL.sub("", drawn[-2] if len(drawn) > 1 else drawn[0]).splitlines()

    def shows(self, text: str) -> bool:
        assert self.process.poll() is None, self.said
        return any(text in line for line in self.screen)

    def type(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def is_as_before(self) -> bool:
        """Whether the terminal has its settings back, and the screen that was there."""
        is_back = self.said.count("\x1b[?1049h") == self.said.count("\x1b[?1049l")
        return is_back and termios.tcgetattr(self._theirs) == self.settings

    def ended(self, within_seconds: float = 30) -> int:
        return self.process.wait(within_seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.read_on()
        os.close(self._theirs)
        self._thread.join()
        os.close(self._ours)


def read_all(ours: int) -> bytes:
    """What was written to a terminal, until nobody holds its other end; closes this one."""
    seen = b""
    with suppress(OSError):  # the other end is closed
        while piece := os.read(ours, 65536):
            seen += piece
    os.close(ours)
    return seen


def wait_until_shown(terminal: Terminal, text: str) -> None:
    eventually(lambda: terminal.shows(text))
