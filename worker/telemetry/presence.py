"""A worker process says it is there and how far it is: a key in Redis that expires when the process falls silent."""

import logging

from redis import Redis, RedisError

from keye.config import keys
from keye.config.codes import OpenEnum
from keye.config.contract import Report
from keye.config.outcome import ModelIdentity, WorkerIdentity
from keye.worker.periodic_thread import PeriodicThread

RENEW_EVERY_SECONDS = 5.0
EXPIRY_SECONDS = 20

logger = logging.getLogger(__name__)


class WorkerState(OpenEnum):
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"


class Presence(Report):
    """What the key holds; `model` is unset until it is loaded, and so is how many tokens a job may have here.

    `warnings` are for a person: what this worker had to do without.
    """

    worker: WorkerIdentity
    state: WorkerState
    model: ModelIdentity | None = None
    max_tokens: int | None = None
    warnings: tuple[str, ...] = ()


def read_presence(redis: Redis, host: str, pid: int) -> Presence | None:
    """None when no such process has spoken within `EXPIRY_SECONDS`."""
    content = redis.get(keys.worker(host, pid))
    return None if content is None else Presence.model_validate_json(content)


def list_present(redis: Redis) -> list[Presence]:
    """Every worker process that has spoken within `EXPIRY_SECONDS`."""
    contents = (redis.get(key) for key in redis.scan_iter(keys.WORKERS))
    return [Presence.model_validate_json(content) for content in contents if content is not None]


class Announcer(PeriodicThread):
    """Writes the presence at once when it changes and again every `RENEW_EVERY_SECONDS`, from a thread of its own."""

    def __init__(self, redis: Redis, presence: Presence) -> None:
        super().__init__("presence", RENEW_EVERY_SECONDS)
        self._redis = redis
        self._key = keys.worker(presence.worker.host, presence.worker.pid)
        self.announce(presence)

    def announce(self, presence: Presence) -> None:
        self._presence = presence
        self.wake()

    def stop(self) -> None:
        """Others see at once that the process is gone."""
        super().stop()
        try:
            self._redis.delete(self._key)
        except RedisError as error:
            logger.warning("This worker stays announced for %d s: %s", EXPIRY_SECONDS, error)

    def turn(self) -> None:
        if (max_tokens := self._presence.max_tokens) is not None:
            # Producers read the smallest of all live workers': a larger one's is not renewed beside it.
            announced = self._redis.get(keys.CONTEXT)
            if announced is None or max_tokens <= int(announced):
                self._redis.set(keys.CONTEXT, max_tokens, ex=EXPIRY_SECONDS)
        self._redis.set(self._key, self._presence.model_dump_json(), ex=EXPIRY_SECONDS)
