"""Tells a job's stream how far its attempt is. The first event is claim's, the last ones settle's."""

import logging
import time
from collections.abc import Sequence

from redis import Redis
from redis.exceptions import RedisError

from keye.config import keys
from keye.config.argument_limit import LOWEST_LIMIT_BYTES, ArgumentTooLarge, check_arguments
from keye.config.event import Channel, FramesDecoded, Stage, StageStarted, TextGenerated
from keye.worker.leases.job_lease import Claimed

log = logging.getLogger(__name__)

# At ten events a second more than a quarter of an hour of text; all of it is in the outcome.
MAX_EVENTS = 10_000
SILENCE_SECONDS = 1.0


class EventWriter:
    """Writes events, any number of threads at once. They are a courtesy: where Redis is away jobs go on without."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._silent_until = 0.0

    def write(self, lease: Claimed, events: list[str]) -> bool:
        """Append events (JSON) to the stream, all of them or none; says whether they were.

        One that is larger than what Redis takes is left out. Where they have half a megabyte together, some may be
        written twice.
        """
        if time.monotonic() < self._silent_until:
            return False
        stream = keys.events(lease.job_id)
        try:
            events = without_oversized(self._redis, lease, events)
            # Of a transaction the sizes count together, with what goes around them.
            is_joint = len(events) > 1 and sum(len(event.encode()) for event in events) < LOWEST_LIMIT_BYTES // 2
            with self._redis.pipeline(transaction=is_joint) as writing:
                for event in events:
                    # Never makes the stream: one that a late writer made after it expired would never expire again.
                    writing.xadd(stream, {"event": event}, maxlen=MAX_EVENTS, nomkstream=True)
                writing.execute()
        except RedisError as fault:
            # Every job would wait out the same timeouts, ten times a second.
            self._silent_until = time.monotonic() + SILENCE_SECONDS
            log.warning("job %s: events not written: %s", lease.job_id, fault)
            return False
        return True


def without_oversized(redis: Redis, lease: Claimed, events: Sequence[str]) -> list[str]:
    """The events (JSON) that Redis takes. A text that waited for it for long may be too large: readers see the gap by
    the next one's offset, and the outcome has all of it."""
    fitting = []
    for event in events:
        try:
            check_arguments(redis, (event,))
        except ArgumentTooLarge as fault:
            log.warning("job %s: an event is left out: %s", lease.job_id, fault)
        else:
            fitting.append(event)
    return fitting


class AttemptEvents:
    """What one attempt says, by its own thread. What `may_wait` is written with what follows, or by the settlement.

    Each call but those says whether the event was written.
    """

    def __init__(self, writer: EventWriter, lease: Claimed) -> None:
        self._writer = writer
        self._lease = lease
        self.unwritten: list[str] = []

    def stage(self, stage: Stage, may_wait: bool = False) -> bool:
        """The attempt reached `stage`."""
        return self._tell(StageStarted(stage=stage, attempt=self._lease.attempt, at=time.time()), may_wait)

    def frames(self, media_index: int, done: int, total: int) -> bool:
        """`done` of `total` frames of a video are decoded."""
        attempt = self._lease.attempt
        return self._tell(
            FramesDecoded(media_index=media_index, done=done, total=total, attempt=attempt, at=time.time())
        )

    def text(self, channel: Channel, text: str, offset: int, num_tokens: int, may_wait: bool = False) -> bool:
        """The model wrote `text` after the first `offset` characters of `channel`, and `num_tokens` in all."""
        attempt = self._lease.attempt
        return self._tell(
            TextGenerated(
                channel=channel, text=text, offset=offset, num_tokens=num_tokens, attempt=attempt, at=time.time()
            ),
            may_wait,
        )

    def flush(self) -> None:
        """Write what waits."""
        if self.unwritten and self._writer.write(self._lease, self.unwritten):
            self.unwritten = []

    def _tell(self, event: StageStarted | FramesDecoded | TextGenerated, may_wait: bool = False) -> bool:
        told = [*self.unwritten, event.model_dump_json()]
        is_written = not may_wait and self._writer.write(self._lease, told)
        if is_written:
            self.unwritten = []
        elif may_wait:
            self.unwritten = told
        return is_written
