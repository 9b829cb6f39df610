"""Messages between a worker and its decoder children: JSON, and open files beside it.

No pickles: a child that a medium took over must not be able to run code in the worker.
"""

import json
import math
import select
import socket
import struct
from typing import Any

_LENGTH = struct.Struct("!I")
# Twice what a plan of the most frames there may be, and the time of each, come to.
_MAX_LENGTH = 2**19
_PIECE_BYTES = 2**16

Message = dict[str, Any]


class Nonsense(Exception):
    """What a child sends is no message, or it takes none: a medium took it over, or broke it."""


class Channel:
    """The child's end of a stream socket, which waits for the worker's. `EOFError` when that is gone."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def send(self, message: Message) -> None:
        try:
            self._end.sendall(_packed(message))
        except (BrokenPipeError, ConnectionResetError):
            raise EOFError("the other end is gone") from None

    def receive_file(self) -> tuple[Message, int | None]:
        head, handles, _, _ = socket.recv_fds(self._end, _LENGTH.size, 1)
        (length,) = _LENGTH.unpack(head + self._exactly(_LENGTH.size - len(head)))
        message: Message = json.loads(self._exactly(length))
        return message, handles[0] if handles else None

    def _exactly(self, num_bytes: int) -> bytes:
        parts = bytearray()
        while len(parts) < num_bytes:
            try:
                part = self._end.recv(num_bytes - len(parts))
            except ConnectionResetError:
                part = b""
            if not part:
                raise EOFError("the other end is gone")
            parts += part
        return bytes(parts)


class WorkerChannel:
    """The worker's end, which waits for no child longer than it is told to, and believes none.

    `EOFError` when the other end is gone, `Nonsense` where it says or takes what no child of ours would.
    """

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._end = end
        self._poll = select.poll()
        self._poll.register(end, select.POLLIN)
        self._received = bytearray()

    def fileno(self) -> int:
        return self._end.fileno()

    def close(self) -> None:
        self._end.close()

    def send(self, message: Message, *handles: int) -> None:
        data = _packed(message)
        try:
            num_sent = socket.send_fds(self._end, [data], handles)
        except BlockingIOError:
            num_sent = 0
        except (BrokenPipeError, ConnectionResetError):
            raise EOFError("the other end is gone") from None
        if num_sent < len(data):
            raise Nonsense("it reads no messages")

    def receive(self, seconds: float) -> Message | None:
        """The next message; None where it is not whole, within `seconds` or sooner.

        Files sent along are not taken: the kernel closes them.
        """
        if (message := self._take()) is None and self._poll.poll(math.ceil(seconds * 1000)):
            try:
                piece = self._end.recv(_PIECE_BYTES)
            except ConnectionResetError:
                piece = b""
            if not piece:
                raise EOFError("the other end is gone")
            self._received += piece
            message = self._take()
        return message

    def is_silent(self) -> bool:
        """Whether nothing has come that was not received."""
        return not self._received and not self._poll.poll(0)

    def _take(self) -> Message | None:
        if len(self._received) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._received)
        if length > _MAX_LENGTH:
            raise Nonsense(f"a message of {length:,} bytes")
        end = _LENGTH.size + length
        if len(self._received) < end:
            return None
        body = bytes(self._received[_LENGTH.size : end])
        del self._received[:end]
        try:
            message = json.loads(body, parse_constant=_finite, parse_float=_finite)
        except (ValueError, RecursionError) as error:
            raise Nonsense(f"{body[:100]!r} ({type(error).__name__})") from None
        if not isinstance(message, dict):
            raise Nonsense(f"{body[:100]!r}")
        return message


def _packed(message: Message) -> bytes:
    body = json.dumps(message).encode()
    return _LENGTH.pack(len(body)) + body


def _finite(written: str) -> float:
    if not math.isfinite(number := float(written)):
        raise ValueError(f"{written} is no number")
    return number
