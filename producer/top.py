"""`keye top`: the fleet, looked at again and again in a terminal. What is shown of it: `keye.producer.overview`."""

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime

from rich.console import Group
from rich.live import Live
from rich.text import Text

from keye.config.contract import escaped
from keye.config.faults import KeyeError
from keye.producer.client import Client
from keye.producer.console import OurConsole
from keye.producer.overview import Overview
from keye.producer.shell import tell

INTERVAL_SECONDS = 2.0
# Live, what engines lacked is told of so long, not since their start.
STARVED_OVER_SECONDS = 60.0
# From one look at the keyboard, and at the terminal's size, to the next.
_TICK_SECONDS = 0.25


def show(client: Client, interval: float | None, once: bool, as_json: bool) -> None:
    """One frame, and others where somebody looks or an `interval` (in seconds) is asked for; returns once he leaves.

    Raises what `Client.overview` raises where the first cannot be had: a wrong server is told of as by any command.
    """
    overview, console = client.overview(), OurConsole()
    if console.is_dumb_terminal or not sys.stdout.isatty() or once or as_json:
        _print(client, overview, None if once else interval, as_json)
    else:
        _Screen(client, overview, console, interval or INTERVAL_SECONDS).run()


def _print(client: Client, overview: Overview, interval: float | None, as_json: bool) -> None:
    columns = OurConsole().width if sys.stdout.isatty() else None
    while True:
        title = f"keye top {datetime.now():%Y-%m-%d %H:%M:%S}"
        tell(overview.model_dump_json() if as_json else "\n".join([title, *overview.frame(columns)]))
        if interval is None:
            return
        while True:
            time.sleep(interval)
            try:
                overview = client.overview()
                break
            except (KeyeError, ValueError) as fault:
                tell(escaped(str(fault)), err=True)


class _Screen:
    """Redis is read in a thread of its own: one that hangs keeps nobody from leaving."""

    def __init__(self, client: Client, overview: Overview, console: OurConsole, interval: float) -> None:
        self._client, self._console, self._interval = client, console, interval
        self._seen = overview, ""
        # Those of the last minute or so.
        self._overviews = deque([overview], maxlen=max(2, round(STARVED_OVER_SECONDS / interval)))
        self._is_over = threading.Event()

    def run(self) -> None:
        threading.Thread(target=self._read, name="keye-top", daemon=True).start()
        live = Live(
            get_renderable=self._shown,
            console=self._console,
            screen=True,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        try:
            with _keyboard() as typed_within, live:
                while "q" not in typed_within(_TICK_SECONDS).lower():
                    live.refresh()
        finally:
            self._is_over.set()

    def _read(self) -> None:
        while not self._is_over.wait(self._interval):
            try:
                overview = self._client.overview()
                self._overviews.append(overview)
                self._seen = overview.since(self._overviews[0]), ""
            except Exception as fault:
                # Whatever it is, somebody looks at this screen.
                self._seen = self._seen[0], str(fault) or repr(fault)

    def _shown(self) -> Group:
        columns, rows = self._console.size
        title = Text(f"keye top {datetime.now():%H:%M:%S}, q ends it", style="bold", no_wrap=True)
        overview, fault = self._seen
        lines = overview.frame(columns, rows - 1, fault)
        return Group(title, *(Text(line, no_wrap=True, overflow="ellipsis") for line in lines))


@contextmanager
def _keyboard() -> Iterator[Callable[[float], str]]:
    """What is typed within so many seconds, without a line's end. Nothing where the keyboard is another's."""
    if not sys.stdin.isatty():
        yield _type_nothing
        return
    # Not on every system that a producer runs on.
    import select
    import termios
    import tty

    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)

    def typed_within(seconds: float) -> str:
        is_typed, _, _ = select.select([keyboard], [], [], seconds)
        # Where there is nothing to be read the terminal is gone.
        return (os.read(keyboard, 1024).decode(errors="replace") or "q") if is_typed else ""

    try:
        tty.setcbreak(keyboard)
        yield typed_within
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)


def _type_nothing(seconds: float) -> str:
    time.sleep(seconds)
    return ""
