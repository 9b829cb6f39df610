"""Puts messages that no worker can read where an operator finds them. Who reads it: `keye.producer.dead_letters`."""

import logging
import os
import socket
from collections import deque
from typing import Any

from redis import Redis
from redis.exceptions import RedisError

from keye.config import keys
from keye.config.quarantine import MAX_MESSAGES, entry_of

log = logging.getLogger(__name__)


class Quarantine:
    """Bounded, there and here: what Redis does not take waits for `deliver`. Any thread may call."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._worker = f"{socket.gethostname()}:{os.getpid()}"
        self._waiting: deque[dict[Any, Any]] = deque(maxlen=MAX_MESSAGES)

    def put(self, raw: bytes, reason: str, job_id: str | None) -> None:
        self._waiting.append(dict(entry_of(raw, reason, self._worker, job_id)))
        try:
            self.deliver()
        except RedisError as fault:
            log.warning("%d messages wait to be put into quarantine: %s", len(self._waiting), fault)

    def deliver(self) -> None:
        """Write what waits. Raises the fault of a Redis that is away."""
        while self._waiting:
            try:
                entry = self._waiting.popleft()
            except IndexError:
                return  # another thread had it
            try:
                self._redis.xadd(keys.quarantine(), entry, maxlen=MAX_MESSAGES, approximate=False)
            except RedisError:
                self._waiting.appendleft(entry)
                raise
