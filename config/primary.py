"""The server that takes writes: which one it is where Sentinels watch it, and connections that leave one that is not.

After a failover old connections may stay open to a server that is a replica by now, and refuses all writes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from redis import Redis
from redis.backoff import ConstantBackoff
from redis.connection import AbstractConnection, Connection, SSLConnection, UnixDomainSocketConnection
from redis.exceptions import (
    BusyLoadingError,
    ConnectionError,
    MasterDownError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TimeoutError,
)
from redis.retry import Retry

# One that does not answer is passed over for the next.
SENTINEL_TIMEOUT_SECONDS = 1.0
# Of a server that is none, or not yet. A script's error may hold the code further on, of servers before 7.0.
DEMOTED_CODES = {"READONLY ": ReadOnlyError, "MASTERDOWN ": MasterDownError}


class Primary:
    """What a pool's connections know of it together. Any thread may call."""

    def __init__(self, sentinels: Sequence[tuple[str, int]], service: str, options: Mapping[str, Any]) -> None:
        """`options` are a connection's to each Sentinel. Without Sentinels its address is fixed."""
        given = {
            "socket_timeout": SENTINEL_TIMEOUT_SECONDS,
            "socket_connect_timeout": SENTINEL_TIMEOUT_SECONDS,
            "retry": Retry(ConstantBackoff(0), 1),
            "decode_responses": True,
            **options,
        }
        self._sentinels = [Redis(host=host, port=port, **given) for host, port in sentinels]
        self._service = service
        self._answered_last = 0
        self._address: tuple[str, int] | None = None
        # How often it was another one. What was connected before is to be left.
        self.changes = 0

    def find(self) -> tuple[str, int] | None:
        """Its address by the first Sentinel that knows it; None where it is fixed. Raises redis' `ConnectionError`."""
        if not self._sentinels:
            return None
        faults = []
        for turn in range(len(self._sentinels)):
            index = (self._answered_last + turn) % len(self._sentinels)
            try:
                address: Any = self._sentinels[index].sentinel_get_master_addr_by_name(self._service)
            except RedisError as fault:
                faults.append(str(fault))
                continue
            if address is None:
                faults.append(f"a Sentinel watches no service {self._service!r}")
                continue
            self._answered_last = index
            if self._address not in (None, address):
                self.changes += 1
            self._address = address
            return self._address
        raise ConnectionError(f"no Sentinel tells where it is: {'; '.join(faults)}")


class _Leaving(AbstractConnection):
    """Connects anew, before its next use, once a connection of its pool has found the server no primary."""

    def __init__(self, *, primary: Primary, **options: Any) -> None:
        super().__init__(**options)
        self._primary = primary
        self._joined = 0

    def _connect(self) -> Any:
        if address := self._primary.find():
            self.host, self.port = address
        self._joined = self._primary.changes
        return super()._connect()  # type: ignore[safe-super, no-untyped-call]

    def connect(self) -> None:
        # Called by a pool that hands it out: never between commands that belong together.
        self._leave_if_changed()
        super().connect()  # type: ignore[no-untyped-call]

    def can_read(self, timeout: float = 0) -> bool:
        # Called between two looks at a subscription, which comes back with a new connection.
        self._leave_if_changed()
        return super().can_read(timeout)

    def read_response(self, *args: Any, **options: Any) -> Any:
        try:
            return super().read_response(*args, **options)
        except (ResponseError, BusyLoadingError) as error:
            demoted = _demoted(error)
            # Many hear it at once, of one change.
            if demoted and self._joined == self._primary.changes:
                self._primary.changes += 1
            if demoted is error or demoted is None:
                raise
            raise demoted from None

    def _leave_if_changed(self) -> None:
        if self._sock is not None and self._joined != self._primary.changes:
            self.disconnect()


def _demoted(error: RedisError) -> RedisError | None:
    """The error as the client has a class for it, where it says that the server is no primary."""
    if isinstance(error, (ReadOnlyError, MasterDownError, BusyLoadingError)):
        return error
    text = str(error)
    return next((kind(text) for code, kind in DEMOTED_CODES.items() if code in text), None)


class TcpConnection(_Leaving, Connection):
    pass


class TlsConnection(_Leaving, SSLConnection):
    pass


class UnixConnection(_Leaving, UnixDomainSocketConnection):
    pass


# Nothing of a command that was answered so has been done: it may be sent again, to the server that took over.
WORTH_ANOTHER_TRY = (ConnectionError, TimeoutError, ReadOnlyError, MasterDownError)
