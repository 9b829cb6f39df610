"""A way to the server whose connections can fall silent: both ends stay open, and nothing comes through any more."""

import selectors
import socket
import threading
from typing import Self

TICK_SECONDS = 0.1


class SilentProxy:
    """A context manager. Connections made after `fall_silent` work: only the path of the old ones is gone."""

    def __init__(self, port: int) -> None:
        """`port` is the server's, on loopback."""
        self._server_port = port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self.num_swallowed_bytes = 0
        self._others: dict[socket.socket, socket.socket] = {}
        self._silent: set[socket.socket] = set()
        self._ready = selectors.DefaultSelector()
        self._ready.register(self._listening, selectors.EVENT_READ)
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="silent-proxy")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_stopping = True
        self._thread.join()
        self._ready.close()
        for each in (self._listening, *self._others):
            each.close()

    def lead_to(self, port: int) -> None:
        """Connections made from now on; the old ones stay where they are."""
        self._server_port = port

    def fall_silent(self) -> int:
        """How many connections did."""
        self._silent = set(self._others)
        return len(self._silent) // 2

    def _run(self) -> None:
        while not self._is_stopping:
            for ready, _ in self._ready.select(TICK_SECONDS):
                if ready.fileobj is self._listening:
                    self._accept()
                elif isinstance(ready.fileobj, socket.socket) and ready.fileobj in self._others:
                    self._pass_on(ready.fileobj)

    def _accept(self) -> None:
        ours, _ = self._listening.accept()
        theirs = socket.create_connection(("127.0.0.1", self._server_port))
        for one, other in ((ours, theirs), (theirs, ours)):
            self._others[one] = other
            self._ready.register(one, selectors.EVENT_READ)

    def _pass_on(self, sender: socket.socket) -> None:
        try:
            content = sender.recv(2**16)
            if sender in self._silent:
                self.num_swallowed_bytes += len(content)
                if not content:
                    # Who hung up is not told of to the other.
                    self._ready.unregister(sender)
                return
            self._others[sender].sendall(content)
        except OSError:
            content = b""
        if not content:
            for each in (sender, self._others.pop(sender)):
                self._others.pop(each, None)
                self._ready.unregister(each)
                each.close()
