"""Tells a job's stream how far its attempt is. The first event is claim's, the last one settle's."""

import logging
import time

from redis import Redis
from redis.exceptions import RedisError

from config import keys
from config.event import Channel, FramesDecoded, Stage, StageStarted, TextGenerated
from worker.leases.job_lease import Claimed

log = logging.getLogger(__name__)

# At ten events a second more than a quarter of an hour of text; all of it is in the outcome.
MAX_EVENTS = 10_000
SILENCE_SECONDS = 1.0


class EventWriter:
    """Writes events, any number of threads at once. They are a courtesy: where Redis is away jobs go on without.

    Each call says whether the event was written.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._silent_until = 0.0

    def stage(self, lease: Claimed, stage: Stage) -> bool:
        """The attempt reached `stage`."""
        return self._write(lease, StageStarted(stage=stage, attempt=lease.attempt, at=time.time()))

    def frames(self, lease: Claimed, media_index: int, done: int, total: int) -> bool:
        """`done` of `total` frames of a video are decoded."""
        return self._write(
            lease,
            FramesDecoded(media_index=media_index, done=done, total=total, attempt=lease.attempt, at=time.time()),
        )

    def text(self, lease: Claimed, channel: Channel, text: str, offset: int, num_tokens: int) -> bool:
        """The model wrote `text` after the first `offset` characters of `channel`, and `num_tokens` in all."""
        return self._write(
            lease,
            TextGenerated(
                channel=channel, text=text, offset=offset, num_tokens=num_tokens, attempt=lease.attempt, at=time.time()
            ),
        )

    def _write(self, lease: Claimed, event: StageStarted | FramesDecoded | TextGenerated) -> bool:
        if time.monotonic() < self._silent_until:
            return False
        stream = keys.events(lease.job_id)
        try:
            # Never makes the stream: one that a late writer made after it expired would never expire again.
            self._redis.xadd(stream, {"event": event.model_dump_json()}, maxlen=MAX_EVENTS, nomkstream=True)
        except RedisError as fault:
            # Every job would wait out the same timeouts, ten times a second.
            self._silent_until = time.monotonic() + SILENCE_SECONDS
            log.warning("job %s: %s event not written: %s", lease.job_id, event.type, fault)
            return False
        return True
