"""A server that tells lies: it answers each request with what a test gives it, bytes or a generator of them."""

import socket
import ssl
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from threading import Thread

Answer = Callable[[], bytes | Iterable[bytes]]


def answer(status: str, *headers: str, body: bytes = b"") -> bytes:
    return "\r\n".join((f"HTTP/1.1 {status}", *headers, "", "")).encode("latin-1") + body


def endlessly(head: bytes, piece: bytes, pause_seconds: float = 0.0) -> Answer:
    """`head`, then `piece` again and again for as long as anybody takes it."""

    def pieces() -> Iterator[bytes]:
        yield head
        while True:
            yield piece
            time.sleep(pause_seconds)

    return pieces


class Liar:
    """`answers` by method; one a connection, since none is fit for a second. `requests` are lines as they came.

    A `greeting` among them is what it says to whoever connects, and all it says.
    """

    def __init__(self, answers: dict[str, Answer], tls: ssl.SSLContext | None) -> None:
        self._answers = answers
        self._tls = tls
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._connections: list[socket.socket] = []
        self.requests: list[str] = []
        self.num_sent = 0
        self.address = self._listener.getsockname()
        self.url = f"http://127.0.0.1:{self.address[1]}"

    def serve(self) -> None:
        with suppress(OSError), self._listener:  # shut down, at the end
            while True:
                connection, _ = self._listener.accept()
                self._connections.append(connection)
                Thread(target=self._serve_one, args=(connection,), daemon=True).start()

    def close(self) -> None:
        for each in (self._listener, *self._connections):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _serve_one(self, connection: socket.socket) -> None:
        with suppress(OSError), connection:
            if greeting := self._answers.get("greeting"):
                self._send(connection, greeting)
                return
            secured = self._tls.wrap_socket(connection, server_side=True) if self._tls else connection
            with secured, secured.makefile("rb") as asked:
                line = asked.readline().decode().strip()
                while asked.readline() not in (b"\r\n", b""):
                    pass
                self.requests.append(line)
                self._send(secured, self._answers[line.split()[0]])

    def _send(self, connection: socket.socket, said: Answer) -> None:
        given = said()
        for piece in (given,) if isinstance(given, bytes) else given:
            connection.sendall(piece)
            self.num_sent += len(piece)


@contextmanager
def lying(tls: ssl.SSLContext | None = None, **answers: Answer) -> Iterator[Liar]:
    liar = Liar(answers, tls)
    thread = Thread(target=liar.serve)
    thread.start()
    try:
        yield liar
    finally:
        liar.close()
        thread.join()
