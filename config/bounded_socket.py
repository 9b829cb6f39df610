"""A socket on which no answer holds up who reads it, whatever comes of it and however slowly. Knows no S3."""

import socket
from collections.abc import Callable
from contextlib import suppress
from io import BufferedReader, RawIOBase
from typing import Any

# How often who waits for a silent server looks whether it still should.
_TICK_SECONDS = 0.25


class BoundedSocket:
    """For `sock` of a connection of http.client or urllib3, of TLS or not: head, chunks and trailer are read by it too.

    `watch` is called for each answer and gives what is called with all that comes of it, and several times a second
    while nothing does: what that raises ends the reading. A silence as long as the timeout that the socket has by then
    ends it with `TimeoutError`, as it would by itself.
    """

    def __init__(self, sock: socket.socket, watch: Callable[[], Callable[[], None]]) -> None:
        self._sock = sock
        self._watch = watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def makefile(self, mode: str, buffering: int = -1) -> RawIOBase | BufferedReader:
        """As that of a socket, for reading bytes."""
        waiting = _Waiting(self._sock, self._watch())
        return waiting if buffering == 0 else BufferedReader(waiting)


class _Waiting(RawIOBase):
    def __init__(self, sock: socket.socket, go_on: Callable[[], None]) -> None:
        self._sock = sock
        # Keeps it open for as long as this is: connections close theirs once the head of a last answer is read.
        self._held = sock.makefile("rb", buffering=0)
        self._go_on = go_on
        self._silence_seconds = sock.gettimeout()
        self._tick_seconds = min(_TICK_SECONDS, self._silence_seconds or _TICK_SECONDS)
        sock.settimeout(self._tick_seconds)

    def readable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._held.fileno()

    def readinto(self, buffer: Any) -> int:
        num_ticks = 0
        while True:
            self._go_on()
            try:
                return self._sock.recv_into(buffer)
            except TimeoutError:
                num_ticks += 1
                if self._silence_seconds is not None and num_ticks * self._tick_seconds >= self._silence_seconds:
                    raise

    def close(self) -> None:
        if not self.closed:
            with suppress(OSError):  # closed by now
                self._sock.settimeout(self._silence_seconds)
        super().close()
        self._held.close()
