"""The largest argument that a Redis takes: on a larger one it closes the connection, which looks like an outage."""

from collections.abc import Iterable
from typing import cast

from redis import Redis
from redis.exceptions import ResponseError

# Neither setting can be lower, so what is below is sent without asking.
LOWEST_LIMIT_BYTES = 2**20
# The settings that bound it, with what they are, in bytes, where nobody changed them.
_DEFAULTS = {"proto-max-bulk-len": 512 * 2**20, "client-query-buffer-limit": 2**30}
# An argument may come a little larger later on: when a worker takes a message, Celery keeps it with more around it.
_ROOM_BYTES = 1024


class ArgumentTooLarge(ValueError):
    """Redis would close the connection on this command, now and whenever it is sent again."""

    def __init__(self, size: int, limit: int, setting: str) -> None:
        super().__init__(f"{size:,} bytes in one piece, this Redis takes {limit:,} ({setting})")


def check_arguments(redis: Redis, arguments: Iterable[object]) -> None:
    """Raises `ArgumentTooLarge` for the largest of a command's arguments, and Redis' own fault where it is away.

    Not for transactions: there the sum counts. Of a script's arguments, and in a pipeline, each counts alone.
    """
    size = _ROOM_BYTES + max((len(text.encode()) for text in arguments if isinstance(text, str)), default=0)
    if size <= LOWEST_LIMIT_BYTES:
        return
    limit, setting = min((_read_limit(redis, setting), setting) for setting in _DEFAULTS)
    if size > limit:
        raise ArgumentTooLarge(size, limit, setting)


def _read_limit(redis: Redis, setting: str) -> int:
    try:
        # One at a time: servers before 7.0 tell no two at once.
        return int(cast(dict[str, str], redis.config_get(setting))[setting])
    except (ResponseError, KeyError):
        # An ACL forbids to ask, or a provider hides it.
        return _DEFAULTS[setting]
