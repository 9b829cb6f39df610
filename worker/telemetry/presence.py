"""A worker process says it is there and how far it is: a key in Redis that expires when the process falls silent."""

import logging
import threading

from redis import Redis, RedisError

from keye.config import keys
from keye.config.contract import OpenEnum, Report
from keye.config.outcome import ModelIdentity, WorkerIdentity

RENEW_EVERY_SECONDS = 5.0
EXPIRY_SECONDS = 20

logger = logging.getLogger(__name__)


class WorkerState(OpenEnum):
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"


class Presence(Report):
    """What the key holds; `model` is unset until it is loaded, and so is how many tokens a job may have here."""

    worker: WorkerIdentity
    state: WorkerState
    model: ModelIdentity | None = None
    max_tokens: int | None = None


def read_presence(redis: Redis, host: str, pid: int) -> Presence | None:
    """None when no such process has spoken within `EXPIRY_SECONDS`."""
    content = redis.get(keys.worker(host, pid))
    return None if content is None else Presence.model_validate_json(content)


def list_present(redis: Redis) -> list[Presence]:
    """Every worker process that has spoken within `EXPIRY_SECONDS`."""
    contents = (redis.get(key) for key in redis.scan_iter(keys.workers()))
    return [Presence.model_validate_json(content) for content in contents if content is not None]


class Announcer:
    """Writes the presence at once when it changes and again every `RENEW_EVERY_SECONDS`, from a thread of its own."""

    def __init__(self, redis: Redis, presence: Presence) -> None:
        self._redis = redis
        self._presence = presence
        self._changed = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="presence", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def announce(self, presence: Presence) -> None:
        self._presence = presence
        self._changed.set()

    def stop(self) -> None:
        self._stopping = True
        self._changed.set()
        self._thread.join()

    def _run(self) -> None:
        key = keys.worker(self._presence.worker.host, self._presence.worker.pid)
        while not self._stopping:
            try:
                if self._presence.max_tokens is not None:
                    self._tell_context(self._presence.max_tokens)
                self._redis.set(key, self._presence.model_dump_json(), ex=EXPIRY_SECONDS)
            except RedisError as error:
                logger.warning("not announced (%s), next try in %g s", error, RENEW_EVERY_SECONDS)
            self._changed.wait(RENEW_EVERY_SECONDS)
            self._changed.clear()
        try:
            self._redis.delete(key)
        except RedisError as error:
            logger.warning("This worker stays announced for %d s: %s", EXPIRY_SECONDS, error)

    def _tell_context(self, max_tokens: int) -> None:
        """Let the smallest of all live workers' be what producers read: a larger one's is not renewed beside it."""
        told = self._redis.get(keys.context())
        if told is None or max_tokens <= int(told):
            self._redis.set(keys.context(), max_tokens, ex=EXPIRY_SECONDS)
