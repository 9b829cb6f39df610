"""Tells a job's stream how far its attempt is, and its record that it waits. The first event is claim's, the last ones
settle's.
"""

import logging
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from redis import Redis
from redis.exceptions import RedisError

from keye.config import keys
from keye.config.connection import LOWEST_LIMIT_BYTES, ArgumentTooLarge, check_arguments
from keye.config.contract import Report
from keye.config.event import Channel, TextGenerated
from keye.config.scripts import load_script
from keye.worker.leases.claims import Claimed
from keye.worker.results.thinking import AnswerForm, Piece, ThinkingSplitter

log = logging.getLogger(__name__)

# At ten events a second more than a quarter of an hour of text; all of it is in the outcome.
MAX_EVENTS = 10_000
SILENCE_SECONDS = 1.0
# Of text, until it is written.
MAX_WAIT_SECONDS = 0.1
MAX_WAITING_TOKENS = 32
# Where more are written side by side each waits longer, so that a stream keeps the events of a long job.
ANSWERS_AT_FULL_RATE = 8


class EventWriter:
    """Writes events, any number of threads at once. They are a courtesy: where Redis is away jobs go on without."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._write_waits = load_script(redis, "waits")
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
            self._fall_silent(lease, fault)
            return False
        return True

    def write_waits(self, lease: Claimed, waits: bool) -> None:
        """Note in the record whether the attempt waits for its turn."""
        if time.monotonic() < self._silent_until:
            return
        try:
            self._write_waits([keys.record(lease.job_id)], [lease.token, int(waits)])
        except RedisError as fault:
            self._fall_silent(lease, fault)

    def _fall_silent(self, lease: Claimed, fault: RedisError) -> None:
        """Every job would wait out the same timeouts, ten times a second."""
        self._silent_until = time.monotonic() + SILENCE_SECONDS
        log.warning("job %s: events not written: %s", lease.job_id, fault)


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
    """What one attempt says, by its own thread; `num_tokens` are those of all its answers."""

    def __init__(self, writer: EventWriter, lease: Claimed) -> None:
        self._writer = writer
        self._lease = lease
        self.unwritten: list[str] = []
        self.num_tokens = 0

    def tell(self, kind: type[Report], may_wait: bool = False, **facts: Any) -> bool:
        """An event of this kind with these facts. What `may_wait` is written with what follows, or by the settlement.

        Says whether it is taken care of: written, or kept to be.
        """
        event = kind.model_validate({**facts, "attempt": self._lease.attempt, "at": time.time()})
        events = [*self.unwritten, event.model_dump_json()]
        is_taken_care_of = may_wait or self._writer.write(self._lease, events)
        if is_taken_care_of:
            self.unwritten = events if may_wait else []
        return is_taken_care_of

    def flush(self) -> None:
        """Write what waits."""
        if self.unwritten and self._writer.write(self._lease, self.unwritten):
            self.unwritten = []


class Coalescer:
    """Writes an event when its text has waited for `MAX_WAIT_SECONDS` or is of `MAX_WAITING_TOKENS`; the first at once.

    Text that could not be written is written with the next. Of a job with several answers (`num_answers`) each has one.
    """

    def __init__(
        self,
        events: AttemptEvents,
        form: AnswerForm = "free",
        *,
        question: int = 0,
        sample: int = 0,
        num_answers: int = 1,
    ) -> None:
        self._events = events
        self._max_wait_seconds = MAX_WAIT_SECONDS * max(1, num_answers / ANSWERS_AT_FULL_RATE)
        self._place = {"question": question, "sample": sample}
        self._are_several = num_answers > 1
        self._splitter = ThinkingSplitter(form)
        self._waiting: list[Piece] = []
        self._offsets: Counter[Channel] = Counter()
        self._num_tokens = 0
        self._num_tokens_written = 0
        self._written_at = 0.0

    def push(self, text: str, num_tokens: int, is_last: bool = False) -> None:
        """Text that came, never half a character, and how many tokens it took; the last is left to `flush`."""
        self._num_tokens += num_tokens
        self._events.num_tokens += num_tokens
        self._add(self._splitter.push(text))
        is_much = self._num_tokens - self._num_tokens_written >= MAX_WAITING_TOKENS
        if not is_last and (is_much or time.monotonic() - self._written_at >= self._max_wait_seconds):
            self._tell()

    def flush(self) -> None:
        """Nothing follows: what waits is written with the end of the job."""
        self._add(self._splitter.flush())
        self._tell(may_wait=True)

    def _add(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            if self._waiting and self._waiting[-1].channel == piece.channel:
                piece = Piece(piece.channel, self._waiting.pop().text + piece.text)
            self._waiting.append(piece)

    def _tell(self, may_wait: bool = False) -> None:
        while self._waiting:
            channel, text = self._waiting[0]
            facts = {"channel": channel, "text": text, "offset": self._offsets[channel], **self._place}
            if self._are_several:
                facts["num_tokens_of_all"] = self._events.num_tokens
            if not self._events.tell(TextGenerated, may_wait, num_tokens=self._num_tokens, **facts):
                break
            self._offsets[channel] += len(text)
            self._waiting.pop(0)
            self._written_at = time.monotonic()
            self._num_tokens_written = self._num_tokens
