"""The server that takes writes: which one it is where Sentinels watch it, whether it is one that can be used, and
connections that leave one that is a replica by now: after a failover old ones may stay open.
"""

import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from redis import Redis
from redis.backoff import ConstantBackoff
from redis.connection import AbstractConnection, Connection, SSLConnection, UnixDomainSocketConnection
from redis.exceptions import (
    BusyLoadingError,
    ClusterCrossSlotError,
    ClusterError,
    ConnectionError,
    MasterDownError,
    MovedError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TimeoutError,
)
from redis.retry import Retry
from redis.utils import str_if_bytes

OLDEST_VERSION = (6, 2)
CLUSTER = (
    "The server is a Redis Cluster, which cannot be used: one script changes a job and the lists of all jobs. "
    "Use a single server, with Sentinels where it must outlive its machine."
)
REPLICA = (
    "The server is a replica, which takes no writes. Use the address of its primary, "
    "or that of Sentinels, which know it (sentinel://)."
)
OLD = "The server is older than Redis 6.2 ({version}). Use Redis 6.2 or newer, or Valkey."
# One that does not answer is passed over for the next.
SENTINEL_TIMEOUT_SECONDS = 1.0
_WHERE, _REPLICAS = "SENTINEL GET-MASTER-ADDR-BY-NAME", "SENTINEL SLAVES"
# An old primary takes writes, which are lost, for seconds after Sentinels have chosen another: they are asked again, by
# whoever next takes a connection. Where none answers, less often.
LOOK_SECONDS, LOOK_AFTER_FAULT_SECONDS = 1.0, 10.0
# Before 7.0 a script's error holds these further on, where the client does not see them.
SCRIPT_CODES = {"-READONLY ": ReadOnlyError, "-MASTERDOWN ": MasterDownError, "-OOM ": OutOfMemoryError}
# What a server says that is no primary, or not yet.
DEMOTED = (ReadOnlyError, MasterDownError, BusyLoadingError)


class ServerUnusable(ResponseError):
    """A Cluster or too old: waiting does not help."""


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
        self._look_at = 0.0
        self._address: tuple[str, int] | None = None
        # How often it was another one. What was connected before is to be left.
        self.changes = 0
        self.is_examined = False

    def find(self) -> tuple[str, int] | None:
        """Its address by the first Sentinel that knows it; None where it is fixed. Raises redis' `ConnectionError`."""
        if not self._sentinels:
            return None
        faults = []
        # Before the answer: others need not ask meanwhile.
        self._look_at = time.monotonic() + LOOK_SECONDS
        for turn in range(len(self._sentinels)):
            index = (self._answered_last + turn) % len(self._sentinels)
            try:
                address = self._ask(self._sentinels[index], _WHERE)
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
        self._look_at = time.monotonic() + LOOK_AFTER_FAULT_SECONDS
        raise ConnectionError(f"no Sentinel tells where it is: {'; '.join(faults)}")

    def _ask(self, sentinel: Any, what: str) -> Any:
        # The client's own verbs for these take no Sentinel alone in all its releases.
        return sentinel.execute_command(what, self._service)

    @property
    def is_watched(self) -> bool:
        return bool(self._sentinels)

    def look(self) -> None:
        """Have `changes` count what Sentinels know by now."""
        if self._sentinels and time.monotonic() > self._look_at:
            with suppress(ConnectionError):
                self.find()

    def is_alone(self) -> bool:
        """Whether the Sentinels that answer agree that it is the primary, and know no replica that could take over.

        One that is being put in its place does not follow any more, and some Sentinels learn of it seconds later.
        """
        answers = []
        for sentinel in self._sentinels:
            with suppress(RedisError):
                answers.append(self._ask(sentinel, _WHERE) == self._address)
                answers += [not _could_take_over(replica) for replica in self._ask(sentinel, _REPLICAS)]
        return bool(answers) and all(answers)


def _could_take_over(replica: Mapping[str, Any]) -> bool:
    if "promoted" in replica["flags"]:
        return True
    is_down = replica["is_sdown"] or replica["is_odown"] or replica["is_disconnected"]
    return replica["role-reported"] == "slave" and replica["master-link-status"] == "ok" and not is_down


class _Leaving(AbstractConnection):
    """Connects anew, before its next use, once a connection of its pool has found the server no primary."""

    # Who holds it sees to that himself.
    is_kept = False
    _was_heard = False

    def __init__(self, *, primary: Primary, **options: Any) -> None:
        try:
            super().__init__(**options)
        except OSError as error:
            # It reads a file of its own package, which takes one that may be opened, as a socket does.
            raise ConnectionError(f"no connection can be made: {error}") from error
        self._primary = primary
        self._joined = 0

    def _connect(self) -> Any:
        if address := self._primary.find():
            self.host, self.port = address
        self._joined = self._primary.changes
        return super()._connect()  # type: ignore[safe-super, no-untyped-call]

    def connect(self) -> None:
        # Called by a pool that hands it out: never between commands that belong together.
        self._leave_if_outdated()
        self._was_heard = self._sock is not None and time.monotonic() < self.next_health_check
        try:
            super().connect()  # type: ignore[no-untyped-call]
            if not self._primary.is_examined:
                self._examine()
        except ResponseError as error:
            self.disconnect()  # type: ignore[no-untyped-call]
            # Known since 6.0, and without an argument since 6.2.
            if re.search("(?i)unknown command.*hello|arguments for 'hello'", str(error)):
                raise ServerUnusable(OLD.format(version="it does not know HELLO")) from None
            raise

    def can_read(self, timeout: float = 0) -> bool:
        # Called between two looks at a subscription, which comes back with a new connection.
        self._leave_if_outdated()
        # And by the pool, next to `connect`: of one that was just heard the next answer tells as much. The look is a
        # system call, for which a thread gives Python's lock away: a twentieth of what a job costs.
        was_heard, self._was_heard = self._was_heard, False
        return not (was_heard and timeout == 0 and not self.is_kept) and super().can_read(timeout)

    def read_response(self, *args: Any, **options: Any) -> Any:
        try:
            return super().read_response(*args, **options)
        except (ResponseError, BusyLoadingError) as error:
            text = str(error)
            known = next((kind(text) for code, kind in SCRIPT_CODES.items() if code in text), error)
            # Many hear it at once, of one change.
            if isinstance(known, DEMOTED) and self._joined == self._primary.changes:
                self._primary.changes += 1
            raise known from None

    def _examine(self) -> None:
        """Raises `ReadOnlyError` for a replica and `ServerUnusable`. The protocol's version 3 began by asking."""
        told = self.handshake_metadata
        if not told:
            self.send_command("HELLO")  # type: ignore[no-untyped-call]
            try:
                told = self.read_response()
            except NoPermissionError:
                told = {}
        if isinstance(told, list):
            told = dict(zip(told[::2], told[1::2], strict=True))
        facts = {str_if_bytes(name): str_if_bytes(value) for name, value in told.items()}
        version = facts.get("version", "")
        if tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST_VERSION and version:
            raise ServerUnusable(OLD.format(version=version))
        if facts.get("mode") == "cluster":
            raise ServerUnusable(CLUSTER)
        if facts.get("role", "master") != "master":
            raise ReadOnlyError(REPLICA)
        self._primary.is_examined = True

    def is_outdated(self) -> bool:
        """Whether it is connected to what was the primary before."""
        self._primary.look()
        return self._sock is not None and self._joined != self._primary.changes

    def _leave_if_outdated(self) -> None:
        if not self.is_kept and self.is_outdated():
            self.disconnect()  # type: ignore[no-untyped-call]


def refusal_of(error: RedisError) -> str | None:
    """What to tell of a server that cannot be used, be it so from the beginning or since its last restart."""
    if isinstance(error, ServerUnusable):
        return str(error)
    if isinstance(error, ReadOnlyError):
        return REPLICA
    is_cluster = isinstance(error, (ClusterError, MovedError)) and not isinstance(error, MasterDownError)
    return CLUSTER if is_cluster or isinstance(error, ClusterCrossSlotError) else None


class TcpConnection(_Leaving, Connection):
    pass


class TlsConnection(_Leaving, SSLConnection):
    pass


class UnixConnection(_Leaving, UnixDomainSocketConnection):
    pass


# Nothing of a command that was answered so has been done: it may be sent again, to the server that took over.
WORTH_ANOTHER_TRY = (ConnectionError, TimeoutError, ReadOnlyError, MasterDownError)
