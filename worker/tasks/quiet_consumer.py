"""Celery's consumer without chatter, between workers and in the log, however the worker is started."""

import logging
import warnings
from typing import Any

from billiard.exceptions import RestartFreqExceeded
from celery.exceptions import CPendingDeprecationWarning
from celery.worker.consumer import Consumer
from redis.exceptions import RedisError

from worker.leases.connection import passes

# Gossip and heartbeats fan out with the square of the workers, mingle delays every start by a second.
SILENCE = {"without_gossip": True, "without_mingle": True, "without_heartbeat": True}
TIMERS = "kombu.asynchronous.hub"


class QuietConsumer(Consumer):
    def __init__(self, *args: Any, worker_options: dict[str, Any] | None = None, **kwargs: Any) -> None:
        for name in (TIMERS, "celery.worker.consumer.consumer"):
            logging.getLogger(name).addFilter(tell_outage_briefly)
        # Of each lost connection: that an option which `celery_options` sets may have another default one day.
        warnings.filterwarnings("ignore", category=CPendingDeprecationWarning)
        super().__init__(*args, worker_options={**(worker_options or {}), **SILENCE}, **kwargs)


def tell_outage_briefly(record: logging.LogRecord) -> bool:
    """Without Celery's tracebacks of a Redis that is away or full, and without what kombu's timers say each second."""
    fault = record.exc_info[1] if record.exc_info else None
    if not (isinstance(fault, RestartFreqExceeded) or (isinstance(fault, RedisError) and passes(fault))):
        return True
    record.exc_info = record.exc_text = None
    return record.name != TIMERS
