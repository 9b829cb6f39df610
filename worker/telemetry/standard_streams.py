"""stdout and stderr of a process, where words come out that pass the log by: those of native code, of Python's and
Celery's signal handlers, of where threads stand. Nobody waits for who reads them.
"""

import errno
import os
import select
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from contextlib import suppress
from types import FrameType

STDOUT, STDERR = 1, 2

# A socket, such as that of systemd's journal, has no other way to be written to without waiting.
SOCKET_MICROSECONDS = 10_000
# A terminal may say that it has room, and take nothing.
PAUSE_SECONDS = 0.01
# Of a thread, told from the one it is in.
MAX_CALLS = 100


def wait_for_no_reader() -> None:
    """From here on a write to stdout or stderr, from a child process too, fails with EAGAIN where it would wait."""
    for descriptor in (STDOUT, STDERR):
        try:
            _free(descriptor)
        except OSError as error:
            # Else one that nobody reads any more, which fails at once by itself.
            if error.errno == errno.EBADF:
                # What is opened next, a connection say, must not get its number.
                _put(os.open(os.devnull, os.O_WRONLY), descriptor)


def _free(descriptor: int) -> None:
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISSOCK(mode):
        with socket.socket(fileno=os.dup(descriptor)) as stream:
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 0, SOCKET_MICROSECONDS))
    elif os.get_blocking(descriptor) and (stat.S_ISFIFO(mode) or os.isatty(descriptor)):
        try:
            # Opened once more: what we were given may be others' too, a shell's, and not to be changed under them.
            own = os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except PermissionError:
            own = _relay_to(descriptor)
        _put(own, descriptor)


def _put(opened: int, descriptor: int) -> None:
    if opened != descriptor:
        os.dup2(opened, descriptor)
        os.close(opened)
    os.set_inheritable(descriptor, True)


def _relay_to(descriptor: int) -> int:
    """A pipe to a process that waits for the reader: of what was opened by another user, as before `setpriv`."""
    source, own = os.pipe()
    os.set_blocking(own, False)
    # A session of its own: it has to outlive a Ctrl-C, and ends once nobody writes any more.
    subprocess.Popen(["cat"], stdin=source, stdout=descriptor, stderr=subprocess.DEVNULL, start_new_session=True)
    os.close(source)
    return own


class Room:
    """Of a stream, for more to be written."""

    def __init__(self, descriptor: int) -> None:
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)

    def wait(self, seconds: float | None = None) -> None:
        self._poll.poll(None if seconds is None else 1000 * seconds)
        time.sleep(PAUSE_SECONDS)


def _list_threads() -> str:
    """Those that stand alike once, in the words of `faulthandler`, which lists a hundred at most."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    standing: dict[str, list[str]] = {}
    for ident, frame in sys._current_frames().items():
        calls: list[str] = []
        place: FrameType | None = frame
        while place is not None and len(calls) < MAX_CALLS:
            calls.append(f'  File "{place.f_code.co_filename}", line {place.f_lineno} in {place.f_code.co_name}\n')
            place = place.f_back
        standing.setdefault("".join(calls), []).append(names.get(ident, f"{ident:#x}"))
    # What many do alike is rest.
    ordered = sorted(standing.items(), key=lambda each: len(each[1]))
    return "\n".join(
        f"Thread {', '.join(who[:3])}{f' and {len(who) - 3} more' * (len(who) > 3)} (most recent call first):\n{calls}"
        for calls, who in ordered
    )


def tell_threads(seconds: float) -> None:
    """Where each thread stands, to stderr, whose reader may take so long."""
    end = time.monotonic() + seconds
    with suppress(OSError):
        # At once it may be more than a pipe holds.
        text = _list_threads().encode(errors="backslashreplace")
        while text and (left := end - time.monotonic()) > 0:
            try:
                text = text[os.write(STDERR, text) :]
            except BlockingIOError:
                Room(STDERR).wait(left)
