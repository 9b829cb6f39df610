"""Connections to Redis, patience with one that is away, and how large an argument may be.

Celery keeps connections of its own, to the same URL and with the same timeouts (`keye.worker.broker.transport`).
"""

import email.parser
import encodings.idna
import logging
import random
import threading
import time
from collections.abc import Callable, Collection
from typing import Any, TypeVar, cast

from redis import BlockingConnectionPool, Redis
from redis.backoff import ConstantBackoff
from redis.exceptions import ClusterDownError, OutOfMemoryError, ReadOnlyError, RedisError, ResponseError, TryAgainError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from keye.config.faults import InvalidSettings
from keye.config.key_prefix import PrefixedRedis
from keye.config.primary import WORTH_ANOTHER_TRY
from keye.config.redis_url import RedisUrl

# What redis-py and the socket import with a process' first connection. A child that is forked while a thread does so
# finds the module's lock taken, for ever.
FIRST_NEEDED = (email.parser, encodings.idna)

log = logging.getLogger(__name__)

T = TypeVar("T")

SOCKET_TIMEOUT_SECONDS = 5.0
HEALTH_CHECK_SECONDS = 5
# Of one client. Whoever finds all in use waits for one, as long as for a server that is mute.
MAX_CONNECTIONS = 64
WAIT_FOR_CONNECTION_SECONDS = 20
# Of Celery's connections, which are in pools of its own.
CELERY_DEFAULTS = {
    "socket_timeout": SOCKET_TIMEOUT_SECONDS,
    "socket_connect_timeout": SOCKET_TIMEOUT_SECONDS,
    "health_check_interval": HEALTH_CHECK_SECONDS,
}


def connect(
    redis_url: str,
    timeout_seconds: float = SOCKET_TIMEOUT_SECONDS,
    retries: int = 1,
    retry_pause_seconds: float = 0,
    encoding_errors: str = "strict",
    key_prefix: str = "",
) -> Redis:
    """A client for any number of threads, which notices a half-open connection within seconds.

    One more try replaces a connection that died while idle, or whose server is no primary any more; waiting out an
    outage is `Patience`'s. There is one more in connecting and in commands, one within the other: a mute server costs
    four timeouts. Raises `InvalidSettings` for a URL that cannot be read, or not in all its parts.
    """
    try:
        url = RedisUrl.read(redis_url)
    except ValueError as fault:
        raise InvalidSettings(f"KEYE_REDIS_URL: {fault}") from None
    options = url.connection_options(
        decode_responses=True,
        encoding_errors=encoding_errors,
        socket_timeout=timeout_seconds,
        socket_connect_timeout=timeout_seconds,
        health_check_interval=HEALTH_CHECK_SECONDS,
        retry=Retry(ConstantBackoff(retry_pause_seconds), retries, WORTH_ANOTHER_TRY),
    )
    bounds = {"max_connections": MAX_CONNECTIONS, "timeout": WAIT_FOR_CONNECTION_SECONDS, **url.pool_options}
    make_pool: Any = BlockingConnectionPool
    pool = make_pool(connection_class=url.connection_class, **bounds, **options)
    return PrefixedRedis.of(pool, key_prefix) if key_prefix else Redis.from_pool(pool)


# What a restart, a failover or an operator freeing memory cures. A server that loads its data, refuses the password or
# has too many clients is a `ConnectionError` too, one whose master is away a `ClusterDownError`.
PASSING_FAULTS = (
    RedisConnectionError,
    RedisTimeoutError,
    OutOfMemoryError,
    ReadOnlyError,
    ClusterDownError,
    TryAgainError,
)
# The same where the client has no class for it: the disk is full, replicas are away, somebody's script runs for long.
# A script's error may hold a code further on.
PASSING_CODES = ("MISCONF", "NOREPLICAS", "BUSY ", "OOM ", "READONLY ", "MASTERDOWN ")
PATIENCE_SECONDS = 600.0
MAX_PAUSE_SECONDS = 5.0


def passes(fault: RedisError) -> bool:
    """Whether waiting helps: Redis is away or full, it does not refuse this command for good."""
    return isinstance(fault, PASSING_FAULTS) or any(code in str(fault) for code in PASSING_CODES)


class Patience:
    """Of one process with its Redis, shared by all threads: it is over when the process has to leave."""

    def __init__(self) -> None:
        self._is_over = threading.Event()

    def end(self) -> None:
        """Whoever waits tries once more, now; whoever comes later tries once."""
        self._is_over.set()

    def wait_out(self, action: Callable[[], T], what: str, seconds: float = PATIENCE_SECONDS) -> T:
        """Run `action` again, with growing jittered pauses, while Redis is away; raise its fault once patience ends."""
        give_up_at = time.monotonic() + seconds
        pause = 0.05
        while True:
            try:
                return action()
            except RedisError as fault:
                if not passes(fault) or self._is_over.is_set() or time.monotonic() + pause > give_up_at:
                    raise
                log.warning("%s: Redis is away (%s), again in %.2f s", what, fault, pause)
            self._is_over.wait(pause * random.uniform(0.5, 1))
            pause = min(2 * pause, MAX_PAUSE_SECONDS)


# On a larger argument Redis closes the connection, which looks like an outage.
# Neither setting can be lower, so what is below is sent without asking.
LOWEST_LIMIT_BYTES = 2**20
# The settings that bound it, with what they are, in bytes, where nobody changed them.
_DEFAULTS = {"proto-max-bulk-len": 512 * 2**20, "client-query-buffer-limit": 2**30}
# An argument may come a little larger later on: when a worker takes a message, Celery keeps it with more around it.
_ROOM_BYTES = 1024


class ArgumentTooLarge(ValueError):
    """Redis would close the connection on this command, now and whenever it is sent again."""


def check_arguments(redis: Redis, arguments: Collection[object]) -> None:
    """Raises `ArgumentTooLarge` for the largest of a command's arguments, and Redis' own fault where it is away.

    Not for transactions: there the sum counts. Of a script's arguments, and in a pipeline, each counts alone.
    """
    longest = max((text for text in arguments if isinstance(text, str)), key=len, default="")
    if _ROOM_BYTES + 4 * len(longest) <= LOWEST_LIMIT_BYTES:
        # Whatever is in it, and in the others.
        return
    size = _ROOM_BYTES + max((len(text.encode()) for text in arguments if isinstance(text, str)), default=0)
    if size <= LOWEST_LIMIT_BYTES:
        return
    limit, setting = min((_read_limit(redis, setting), setting) for setting in _DEFAULTS)
    if size > limit:
        raise ArgumentTooLarge(f"{size:,} bytes in one piece, this Redis takes {limit:,} ({setting})")


def _read_limit(redis: Redis, setting: str) -> int:
    try:
        # One at a time: servers before 7.0 tell no two at once.
        return int(cast(dict[str, str], redis.config_get(setting))[setting])
    except (ResponseError, KeyError):
        # An ACL forbids to ask, or a provider hides it.
        return _DEFAULTS[setting]
