"""Jobs that failed for good: what each asked for, what went wrong in every attempt, and sending it once more.

And messages that no worker could read, to be found or thrown away. How one looks: `keye.config.quarantine`.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, cast

from redis import Redis
from redis.exceptions import RedisError, ResponseError

from keye.config import keys
from keye.config.codes import ErrorCode
from keye.config.faults import DeadLetterNotFound, JobUnreadable, MessageNotFound
from keye.config.job import AnalysisJob
from keye.config.outcome import OUTCOME, FailedAttempt, JobFailure
from keye.config.quarantine import MAX_MESSAGES, QuarantinedMessage
from keye.config.scripts import load_script
from keye.config.topology import result_key
from keye.config.wire import Outline, open_sealed, read_sealed
from keye.producer.following import MAX_ID_PART
from keye.producer.job import Job
from keye.producer.transport import Transport, reaching_redis

# Redis takes other texts for ids too, some of them for a range.
_MESSAGE_ID = re.compile(r"(0|[1-9][0-9]{0,19})-(0|[1-9][0-9]{0,19})")
# Together up to 4 MiB.
_MESSAGES_PER_ROUND_TRIP = 50


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One failed job. `record` is all that is kept of it, nothing where others have put something else in its place.

    `ended_at` is in Unix seconds. What of the record a newer release or a stranger wrote so that it cannot be read
    raises `JobUnreadable` when it is asked for, and not before: the rest can be read, and any letter be purged.
    """

    job_id: str
    ended_at: float
    record: Mapping[str, str] = field(repr=False)

    @property
    def failure(self) -> JobFailure:
        with self._reading("outcome"):
            failure = OUTCOME.validate_json(self.record["outcome"])
            if not isinstance(failure, JobFailure):
                raise ValueError
            return failure

    @property
    def attempts(self) -> tuple[FailedAttempt, ...]:
        """In order, the last that of `failure`."""
        failure = self.failure
        with self._reading("attempts"):
            read = (FailedAttempt.model_validate_json(v) for k, v in self.record.items() if k.startswith("attempt:"))
            by_number = {attempt.attempt: attempt for attempt in read}
            if failure.attempts not in by_number:
                # Workers of 0.2 leave out the attempt that ended the job.
                by_number[failure.attempts] = FailedAttempt(
                    attempt=failure.attempts,
                    worker=self.record["worker"],
                    began_at=float(self.record["claimed_at"]),
                    ended_at=self.ended_at,
                    stage=failure.stage,
                    code=failure.code,
                    message=failure.message,
                )
        return tuple(by_number[number] for number in sorted(by_number))

    @property
    def sealed(self) -> Any:
        """Its input as it was sent, which may be any JSON."""
        with self._reading("input"):
            return json.loads(self.record["sealed"])

    @property
    def job(self) -> AnalysisJob:
        """What was asked. Raises `InvalidJob` or `UnknownSchemaVersion` where the job failed for being unreadable."""
        return open_sealed(self.sealed).job

    @contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        try:
            yield
        except (KeyError, ValueError, RecursionError):
            raise JobUnreadable.of(self.job_id, what if self.record else "record") from None


class DeadLetters:
    """The dead letters of one Redis; each is one for the workers' KEYE_DEAD_LETTER_TTL_SECONDS."""

    def __init__(self, submit: Callable[[AnalysisJob], Job], transport: Transport) -> None:
        self._submit = submit
        self._redis = transport.redis
        self._result_ttl_seconds = transport.result_ttl_seconds

    def find(self, job_id: str) -> DeadLetter:
        """Raises `DeadLetterNotFound`."""
        with reaching_redis("read the dead letter"), self._redis.pipeline(transaction=False) as reading:
            reading.zscore(keys.DEAD_LETTERS, job_id)
            reading.hgetall(keys.record(job_id))
            reading.hget(keys.KEPT, "dead_letter")
            reading.time()
            ended_at, record, kept_seconds, now = replies = reading.execute(raise_on_error=False)
            if is_no_hash := isinstance(record, ResponseError):
                record = replies[1] = {}
            if fault := next((each for each in replies if isinstance(each, RedisError)), None):
                raise fault
        is_gone = ended_at is None or not (record or is_no_hash)
        if is_gone or now[0] - ended_at > float(kept_seconds or math.inf):
            raise DeadLetterNotFound(
                f"Job {job_id!r} is not among the dead letters: it is unknown or did not fail, or its letter was "
                "requeued, purged, or is older than KEYE_DEAD_LETTER_TTL_SECONDS."
            )
        return DeadLetter(job_id, ended_at, record)

    def select(self, codes: Iterable[ErrorCode] = (), since_seconds: float | None = None) -> Iterator[DeadLetter]:
        """Oldest first: those with one of `codes` (none means any) that ended within the last `since_seconds`.

        One whose failure cannot be read has none of the codes.
        """
        wanted = frozenset(codes)
        with reaching_redis("list the dead letters"):
            since = _since(self._redis, since_seconds)
            ids = cast(list[str], self._redis.zrangebyscore(keys.DEAD_LETTERS, since, "+inf"))
        for job_id in ids:
            try:
                letter = self.find(job_id)
            except DeadLetterNotFound:
                # Requeued, purged or too old meanwhile.
                continue
            with suppress(JobUnreadable):
                if not wanted or letter.failure.code in wanted:
                    yield letter

    def requeue(self, letter: DeadLetter, max_pixels: int | None = None, fps: float | None = None) -> Job:
        """Send the job once more, as a new one, with `max_pixels` for every medium and `fps` for every video.

        The letter leaves the list, and its record, which can be read for its own `result_ttl_seconds`, or else
        KEYE_RESULT_TTL_SECONDS, from now on, names the new job in `requeued_as`. Cut off in between, the call can be
        repeated: the job is queued once. Raises what `DeadLetter.job` and `Client.submit` raise, and `InvalidJob` for
        odd options.
        """
        changed = change_media(letter.job, max_pixels, fps)
        # The first job's key would lead back to its failure.
        job = self._submit(changed.model_copy(update={"idempotency_key": f"requeued:{letter.job_id}"}))
        with reaching_redis("close the dead letter"), self._redis.pipeline(transaction=False) as closing:
            own_ttl_seconds = changed.result_ttl_seconds
            ttl_seconds = own_ttl_seconds or int(self._redis.hget(keys.KEPT, "result") or self._result_ttl_seconds)
            closing.hset(keys.record(letter.job_id), "requeued_as", job.id)
            closing.expire(keys.record(letter.job_id), ttl_seconds)
            closing.expire(keys.events(letter.job_id), ttl_seconds)
            closing.zrem(keys.DEAD_LETTERS, letter.job_id)
            closing.execute()
        return job

    def purge(self, letter: DeadLetter) -> None:
        """Forget the job at once: its input, its failure, its attempts, what Celery knows of it.

        Its id stays in the feed of ended jobs, and what was uploaded for it in its bucket.
        """
        names = [keys.record(letter.job_id), keys.events(letter.job_id), keys.DEAD_LETTERS, result_key(letter.job_id)]
        names += keys.idempotency_of(Outline.of(read_sealed(letter.record.get("sealed"))).job.idempotency_key)
        with reaching_redis("purge the dead letter"):
            load_script(self._redis, "purge")(keys=names, args=[letter.job_id])


def change_media(job: AnalysisJob, max_pixels: int | None, fps: float | None) -> AnalysisJob:
    """The job with other limits on its media; limits that contradict the new ones go. Raises `InvalidJob`."""
    fields = job.model_dump(mode="json")
    contents = [message["content"] for message in fields["messages"] or ()]
    for part in chain(fields["media"], *(content for content in contents if not isinstance(content, str))):
        if max_pixels is not None and part["type"] in ("image", "video"):
            part.update(max_pixels=max_pixels, resized_height=None, resized_width=None)
            if part["min_pixels"] is not None and part["min_pixels"] > max_pixels:
                part["min_pixels"] = None
        if fps is not None and part["type"] == "video":
            part.update(fps=fps, content=None)
    return AnalysisJob(**fields)


class Quarantine:
    """The quarantined messages of one Redis, the newest `keye.config.quarantine.MAX_MESSAGES`."""

    def __init__(self, transport: Transport) -> None:
        self._redis = transport.redis

    def find(self, message_id: str) -> QuarantinedMessage:
        """Raises `MessageNotFound`, for what cannot be an id too."""
        with reaching_redis("read the quarantined message"):
            found: Any = _is_message_id(message_id) and self._redis.xrange(keys.QUARANTINE, message_id, message_id)
        if not found:
            raise MessageNotFound(
                f"There is no message {message_id!r} in quarantine: it never was there, or it was purged, or pushed "
                f"out by newer ones (the newest {MAX_MESSAGES:,} stay)."
            )
        return QuarantinedMessage.of(*found[0])

    def select(self, since_seconds: float | None = None) -> Iterator[QuarantinedMessage]:
        """Oldest first: those that were put there within the last `since_seconds`; read bit by bit."""
        with reaching_redis("list the quarantined messages"):
            first = str(max(0, int(_since(self._redis, since_seconds) * 1000)))
        while True:
            with reaching_redis("list the quarantined messages"):
                page: Any = self._redis.xrange(keys.QUARANTINE, first, "+", count=_MESSAGES_PER_ROUND_TRIP)
            for message_id, fields in page:
                yield QuarantinedMessage.of(message_id, fields)
            if len(page) < _MESSAGES_PER_ROUND_TRIP:
                return
            first = f"({page[-1][0]}"

    def purge(self, message_ids: Iterable[str]) -> None:
        """Forget them; passes over what is gone already."""
        if known := [each for each in message_ids if _is_message_id(each)]:
            with reaching_redis("purge the quarantined messages"):
                self._redis.xdel(keys.QUARANTINE, *known)


def _is_message_id(text: str) -> bool:
    return _MESSAGE_ID.fullmatch(text) is not None and max(map(int, text.split("-"))) <= MAX_ID_PART


def _since(redis: Redis, seconds: float | None) -> float:
    """By the clock that dated what lies there (Unix seconds)."""
    if seconds is None:
        return 0.0
    now, microseconds = redis.time()
    return now + microseconds / 1e6 - seconds
