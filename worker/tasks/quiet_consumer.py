"""Celery's consumer without chatter, and its requests without what they hold, however the worker is started."""

import logging
import warnings
from typing import Any

from billiard.exceptions import RestartFreqExceeded
from celery.exceptions import CPendingDeprecationWarning, Reject
from celery.worker.consumer import Consumer
from celery.worker.request import Request
from redis.exceptions import RedisError

from keye.config.connection import passes
from keye.config.topology import ANALYZE_TASK

TALKATIVE = (
    "celery.app.trace",
    "celery.worker.consumer.consumer",
    "kombu.asynchronous.hub",
    "kombu.transport.redis",
    "keye.worker.broker.admission",
    "keye.worker.broker.transport",
)
REPEAT_SECONDS = 10.0


class OutageFilter(logging.Filter):
    """Tells of a Redis that is away or full, and of a message that goes back, without tracebacks, and nothing in the
    same words within ten seconds.

    Else Celery and kombu write a hundred lines a second for as long as it lasts.
    """

    def __init__(self) -> None:
        super().__init__()
        self._told_at: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        fault = record.exc_info[1] if record.exc_info else None
        if isinstance(fault, RestartFreqExceeded | Reject) or (isinstance(fault, RedisError) and passes(fault)):
            record.exc_info = record.exc_text = None
        if record.levelno < logging.WARNING:
            return True
        words = record.getMessage()
        self._told_at = {each: at for each, at in self._told_at.items() if record.created - at < REPEAT_SECONDS}
        return self._told_at.setdefault(words, record.created) == record.created


OUTAGE_FILTER = OutageFilter()


class QuietConsumer(Consumer):
    def __init__(self, *args: Any, worker_options: dict[str, Any] | None = None, **kwargs: Any) -> None:
        for name in TALKATIVE:
            logging.getLogger(name).addFilter(OUTAGE_FILTER)
        # Of each lost connection: that an option which `build_app` sets may have another default one day.
        warnings.filterwarnings("ignore", category=CPendingDeprecationWarning)
        app = kwargs["app"]
        # Celery's own send whatever is put into their arguments.
        for name in app.tasks.keys() - {ANALYZE_TASK}:
            app.tasks.unregister(name)
        # Gossip and heartbeats fan out with the square of the workers, mingle delays every start by a second. Who looks
        # at a worker's events wants to hear of its heart, too.
        silence = {"without_gossip": True, "without_mingle": True}
        silence["without_heartbeat"] = not app.conf.worker_send_task_events
        super().__init__(*args, worker_options={**(worker_options or {}), **silence}, **kwargs)


class JobRequest(Request):
    def info(self, safe: bool = False) -> dict[str, Any]:
        """What `inspect active` and Flower show: without the job itself, which may hold signed URLs."""
        shown: dict[str, Any] = super().info(safe=True)
        return shown
