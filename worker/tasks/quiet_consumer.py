"""Celery's consumer without the chatter between workers, however the worker is started."""

from typing import Any

from celery.worker.consumer import Consumer

# Gossip and heartbeats fan out with the square of the workers, mingle delays every start by a second.
SILENCE = {"without_gossip": True, "without_mingle": True, "without_heartbeat": True}


class QuietConsumer(Consumer):
    def __init__(self, *args: Any, worker_options: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, worker_options={**(worker_options or {}), **SILENCE}, **kwargs)
