"""A worker process says in Redis that it is there, how far it is, and how long its settings keep what has ended."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from redis import Redis, RedisError

from keye.config import keys
from keye.config.presence import EXPIRY_SECONDS, EngineUse, Presence
from keye.worker.periodic_thread import PeriodicThread

RENEW_EVERY_SECONDS = 5.0

logger = logging.getLogger(__name__)


class Announcer(PeriodicThread):
    """Writes the presence at once when it changes and again every `RENEW_EVERY_SECONDS`, from a thread of its own."""

    def __init__(self, redis: Redis, presence: Presence, node: str, kept_seconds: Mapping[str, int]) -> None:
        """`node` is Celery's name for the worker, `kept_seconds` are the fields of `keye.config.keys.KEPT`."""
        super().__init__("presence", RENEW_EVERY_SECONDS)
        self._redis = redis
        self._node = node
        self._kept_seconds: dict[Any, Any] = dict(kept_seconds)
        self._key = keys.worker(presence.worker.host, presence.worker.pid)
        self._warnings: tuple[str, ...] = ()
        self.engine_use: Callable[[], EngineUse | None] = lambda: None
        self.announce(presence)

    def announce(self, presence: Presence) -> None:
        self._presence = presence
        self.wake()

    def warn(self, warnings: tuple[str, ...]) -> None:
        """Beside those of the presence, in place of what was warned of before."""
        self._warnings = warnings
        self.wake()

    def stop(self) -> None:
        """Others see at once that the process is gone."""
        super().stop()
        try:
            self._redis.delete(self._key)
            # Celery leaves its own list by itself.
            self._redis.zrem(keys.NODES, self._node)
        except RedisError as error:
            logger.warning("This worker stays announced for %d s: %s", EXPIRY_SECONDS, error)

    def turn(self) -> None:
        with self._redis.pipeline(transaction=False) as reading:
            reading.time()
            reading.get(keys.CONTEXT)
            reading.pttl(keys.CONTEXT)
            (now, _), announced, left_ms = reading.execute()
        if (max_tokens := self._presence.max_tokens) is not None:
            # Producers read the smallest of all live workers': a larger one's is not renewed beside it.
            context = max_tokens - self._presence.template_tokens
            # One that would live longer was written before the server's clock was set back, perhaps by who is dead.
            if announced is None or context <= int(announced) or left_ms > EXPIRY_SECONDS * 1000:
                self._redis.set(keys.CONTEXT, context, ex=EXPIRY_SECONDS)
        warnings = (*self._presence.warnings, *self._warnings)
        presence = self._presence.model_copy(update={"warnings": warnings, "engine": self.engine_use()})
        with self._redis.pipeline(transaction=False) as saying:
            saying.zadd(keys.NODES, {self._node: now})
            saying.hset(keys.KEPT, mapping=self._kept_seconds)
            saying.set(self._key, presence.model_dump_json(), ex=EXPIRY_SECONDS)
            saying.execute()
