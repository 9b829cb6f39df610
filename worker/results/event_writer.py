"""Tells a job's stream which stage its attempt has reached. The first event is claim's, the last one settle's."""

import logging
import time

from redis import Redis
from redis.exceptions import RedisError

from config import keys
from config.event import Stage, StageStarted
from worker.leases.job_lease import Claimed

log = logging.getLogger(__name__)


class EventWriter:
    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    def stage(self, lease: Claimed, stage: Stage) -> None:
        """Say that the attempt reached `stage`. A courtesy: where Redis is away the job goes on without."""
        event = StageStarted(stage=stage, attempt=lease.attempt, at=time.time())
        try:
            # Never makes the stream: one that a late writer made after it expired would never expire again.
            self._redis.xadd(keys.events(lease.job_id), {"event": event.model_dump_json()}, nomkstream=True)
        except RedisError as fault:
            log.warning("job %s: event %s not written: %s", lease.job_id, stage.value, fault)
