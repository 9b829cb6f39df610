"""The way between a worker and a store, on which requests meet troubles, and how a test goes along it."""

import os
import time
from collections import deque
from collections.abc import Callable
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from typing import Any, Literal
from urllib.parse import urlsplit

CONTENT = bytes(range(256)) * 40
PHOTO = "s3://media/a folder/photo+1?.jpg"
LARGE = os.urandom(20 * 2**20)


# What happens to one GET: an answer 503, one that ends after its first half or comes piece by piece, or an event first.
Trouble = Literal["busy", "breaks off", "drips"] | Callable[[], Any] | None


class Road(ThreadingHTTPServer):
    """Stands between the worker and the store; `meets` of the requests meet `troubles`, the last of them for ever."""

    def __init__(self, store: str) -> None:
        super().__init__(("127.0.0.1", 0), Traveller)
        self.store = store
        self.requests: list[str] = []
        self.meets = "GET"
        self.troubles: deque[Trouble] = deque([None])
        self.noting = Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def next_trouble(self, method: str) -> Trouble:
        with self.noting:
            self.requests.append(method)
            if method != self.meets:
                return None
            return self.troubles.popleft() if len(self.troubles) > 1 else self.troubles[0]


class Traveller(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Road

    def do_HEAD(self) -> None:
        self.forward(self.server.next_trouble("HEAD"))

    def do_GET(self) -> None:
        self.forward(self.server.next_trouble("GET"))

    def forward(self, trouble: Trouble) -> None:
        if trouble == "busy":
            reason = b"" if self.command == "HEAD" else b"<Error><Code>SlowDown</Code></Error>"
            self.answer(503, {"Retry-After": "7"}, reason)
            return
        if callable(trouble):
            trouble()
        far = HTTPConnection(urlsplit(self.server.store).netloc)
        far.request(self.command, self.path, headers=dict(self.headers))
        response = far.getresponse()
        body = response.read()
        self.answer(response.status, dict(response.headers), body, trouble)
        far.close()

    def answer(self, status: int, headers: dict[str, str], body: bytes, trouble: Trouble = None) -> None:
        self.send_response_only(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if trouble == "breaks off":
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        elif trouble == "drips":
            for start in range(0, len(body), 2**17):
                self.wfile.write(body[start : start + 2**17])
                time.sleep(0.05)
        else:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """The tests' output is not the place."""

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:
            self.close_connection = True  # the worker had enough
