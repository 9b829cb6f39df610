"""Messages between a worker and its decoder children: JSON, and open files beside it.

No pickles: a child that a medium took over must not be able to run code in the worker.
"""

import json
import socket
import struct
from typing import Any

_LENGTH = struct.Struct("!I")
_MAX_LENGTH = 16 * 2**20

Message = dict[str, Any]


class Channel:
    """One end of a stream socket. `EOFError` when the other end is gone, `TimeoutError` as the socket is set."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def fileno(self) -> int:
        return self._end.fileno()

    def close(self) -> None:
        self._end.close()

    def send(self, message: Message, *handles: int) -> None:
        body = json.dumps(message).encode()
        data = _LENGTH.pack(len(body)) + body
        try:
            num_sent = socket.send_fds(self._end, [data], handles)
            if num_sent < len(data):
                self._end.sendall(data[num_sent:])
        except (BrokenPipeError, ConnectionResetError):
            raise EOFError("the other end is gone") from None

    def receive(self) -> Message:
        """Files sent along are not taken: the kernel closes them."""
        return self._body(self._exactly(_LENGTH.size))

    def receive_file(self) -> tuple[Message, int | None]:
        head, handles, _, _ = socket.recv_fds(self._end, _LENGTH.size, 1)
        return self._body(head + self._exactly(_LENGTH.size - len(head))), handles[0] if handles else None

    def _body(self, head: bytes) -> Message:
        (length,) = _LENGTH.unpack(head)
        if length > _MAX_LENGTH:
            raise EOFError(f"a message of {length:,} bytes is none of ours")
        message: Message = json.loads(self._exactly(length))
        return message

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
