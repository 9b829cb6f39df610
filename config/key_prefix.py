"""A client whose keys and channels all begin with a prefix: several deployments then share a database and never meet.

Celery's half does the same by kombu's and its results' `global_keyprefix`.
"""

from typing import Any, Self

from redis import ConnectionPool, Redis
from redis.client import Pipeline, PubSub

# Where the names are in the commands that we send. What is not listed is refused: else it would reach another's keys.
_NAMELESS = {"PING", "TIME", "INFO", "ROLE", "CONFIG GET", "SCRIPT LOAD", "WAIT"}
_FIRST_IS_NAME = {
    *("GET", "SET", "TTL", "PTTL", "EXPIRE", "PUBLISH", "XINFO STREAM"),
    *("HGET", "HSET", "HDEL", "HMGET", "HGETALL", "HKEYS", "HSTRLEN"),
    *("LPUSH", "RPUSH", "LRANGE", "LLEN"),
    *("ZADD", "ZREM", "ZCARD", "ZSCORE", "ZRANGE", "ZRANGEBYSCORE"),
    *("XADD", "XDEL", "XLEN", "XRANGE", "XREVRANGE"),
}
_ALL_ARE_NAMES = {"DEL", "EXISTS", "SUBSCRIBE"}


def prefix_of(redis: Redis) -> str:
    return getattr(redis, "key_prefix", "")


def _places(command: str, args: tuple[Any, ...]) -> range:
    """Which of the arguments are names of keys, patterns of them or channels."""
    if command in _NAMELESS:
        return range(0)
    if command in _FIRST_IS_NAME:
        return range(1)
    if command in _ALL_ARE_NAMES:
        return range(len(args))
    if command in ("EVAL", "EVALSHA"):
        return range(2, 2 + int(args[1]))
    if command == "XREAD":
        first = args.index(b"STREAMS") + 1
        return range(first, first + (len(args) - first) // 2)
    if command == "SCAN" and b"MATCH" in args:
        place = args.index(b"MATCH") + 1
        return range(place, place + 1)
    raise NotImplementedError(f"{command}: where its keys are is not known, so it cannot be sent with a key prefix.")


class _Prefixing:
    """Of a client and its pipelines; Redis answers with names in two cases, from which the prefix is taken again."""

    key_prefix: str

    def execute_command(self, command: str, *args: Any, **options: Any) -> Any:
        return super().execute_command(command, *_prefixed(self.key_prefix, command, args), **options)  # type: ignore[misc]

    def parse_response(self, connection: Any, command_name: str, **options: Any) -> Any:
        reply = super().parse_response(connection, command_name, **options)  # type: ignore[misc]
        match command_name, reply:
            case "XREAD", dict():
                return {self._bare(name): entries for name, entries in reply.items()}
            case "XREAD", list():
                return [[self._bare(name), entries] for name, entries in reply]
            case "SCAN", (cursor, names):
                return cursor, [self._bare(name) for name in names]
        return reply

    def _bare(self, name: str) -> str:
        return name.removeprefix(self.key_prefix)


def _prefixed(prefix: str, command: str, args: tuple[Any, ...]) -> list[Any]:
    given = list(args)
    for place in _places(command, args):
        given[place] = f"{prefix}{given[place]}"
    return given


class _PrefixedPipeline(_Prefixing, Pipeline):
    pass


class _PrefixedPubSub(PubSub):
    """What is heard names its channel with the prefix."""

    key_prefix: str

    def execute_command(self, command: str, *channels: Any) -> Any:
        return super().execute_command(command, *_prefixed(self.key_prefix, command, channels))  # type: ignore[no-untyped-call]


class PrefixedRedis(_Prefixing, Redis):
    """Made by `keye.config.connection.connect`."""

    @classmethod
    def of(cls, pool: ConnectionPool, key_prefix: str) -> Self:
        client = cls(connection_pool=pool)
        client.auto_close_connection_pool = True
        client.key_prefix = key_prefix
        return client

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> Pipeline:
        pipeline = _PrefixedPipeline(self.connection_pool, self.response_callbacks, transaction, shard_hint)
        pipeline.key_prefix = self.key_prefix
        return pipeline

    def pubsub(self, **options: Any) -> PubSub:
        heard = _PrefixedPubSub(self.connection_pool, **options)
        heard.key_prefix = self.key_prefix
        return heard
