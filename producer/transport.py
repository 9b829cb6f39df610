"""How jobs reach Redis, and what is read of them there: their records and their events."""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain, repeat, starmap
from typing import Any, cast

from pydantic import ValidationError
from redis import Redis
from redis.client import Pipeline
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError, RedisError, ResponseError

from keye.config import keys
from keye.config.codes import JobState
from keye.config.connection import ArgumentTooLarge, check_arguments, connect, passes
from keye.config.event import JobEnded, StageStarted, read_event
from keye.config.faults import (
    IdempotencyConflict,
    InvalidJob,
    JobNotFound,
    KeyeError,
    QueueFull,
    QueueUnavailable,
    Refusal,
)
from keye.config.job import Priority
from keye.config.primary import DEMOTED, Primary, refusal_of
from keye.config.scripts import load_script
from keye.config.settings import ProducerSettings
from keye.config.topology import message, message_list, result_key
from keye.config.wire import JobOutline, SealedJob, fingerprint_of
from keye.producer.following import BEGINNING, Entry, FeedLook, Look
from keye.producer.least_tokens import least_tokens
from keye.producer.reader import OUTAGE_PAUSE_SECONDS, Reader

# Of a job whose progress is asked for, the events that tell it: frames come every half second for each video.
MAX_PROGRESS_EVENTS = 200
# A reader's call for attention is needed only until its next read.
WAKE_TTL_SECONDS = 60
# How long to stay away from a full queue of which it is not known how fast it empties.
RETRY_AFTER_SECONDS = 30.0
# How long a replica may take to have a job, and how long one that does not is waited for.
WAIT_MS = 500
REPLICATION_SECONDS = 15.0
# How long none is looked for where there was none: one that comes back takes longer to be put in the primary's place.
ALONE_SECONDS = 1.0
# How long a job is kept that was let go of, for whoever else reads it.
RELEASED_SECONDS = 600


# Keys and arguments of the script.
Submission = tuple[list[str], list[str | float]]


class Transport:
    """Connections to one Redis. Threads may share it; a forked child opens connections of its own."""

    def __init__(self, settings: ProducerSettings) -> None:
        self.result_ttl_seconds = settings.result_ttl_seconds
        self.max_queue_depth = settings.max_queue_depth
        # Of one job's id or record that is no UTF-8, those who wait for others must not hear.
        options: Any = {"retry_pause_seconds": 0.5, "encoding_errors": "backslashreplace"}
        self._redis = connect(settings.full_redis_url(), key_prefix=settings.key_prefix, **options)
        self._primary: Primary = self._redis.connection_pool.connection_kwargs["primary"]
        self._alone_until = 0.0
        self._submit = load_script(self.redis, "submit")
        self._end_queued = load_script(self.redis, "end_queued")
        self._progress = load_script(self.redis, "progress")
        self._release = load_script(self.redis, "release")
        self.reader = Reader(self)

    @property
    def redis(self) -> Redis:
        return self._redis

    def submit(self, sealed: SealedJob, retry_failed: bool = False) -> str:
        """Store and queue a new job; returns the id of the job that owns its idempotency key, this or an earlier one.

        With `retry_failed` none that ended without an answer owns it.
        Raises `IdempotencyConflict` where that one asks for something else, `InvalidJob` where it has more tokens at
        least than the live workers hold for a job or Redis does not take a message of its size, and `QueueFull`.
        """
        with reaching_redis("queue the job"):
            submission = self._submission(sealed, retry_failed)
            reply = self._submit_all([submission])[0] if self._primary.is_watched else self._submit(*submission)
        if isinstance(answer := self._answer(sealed, reply), Refusal):
            raise answer
        return answer

    def submit_many(self, jobs: Sequence[SealedJob | Refusal], retry_failed: bool = False) -> list[str | Refusal]:
        """As `submit` for each, in one round trip; what it would raise stands where the id would, as refusals do."""
        accepted = list(jobs)
        submissions = []
        replies: Iterator[Any]
        try:
            for index, job in enumerate(jobs):
                if isinstance(job, SealedJob):
                    try:
                        submissions.append(self._submission(job, retry_failed))
                    except InvalidJob as refusal:
                        accepted[index] = refusal
            replies = iter(self._submit_all(submissions))
        except RedisError as error:
            replies = repeat(error)
        return [job if isinstance(job, Refusal) else self._answer(job, next(replies)) for job in accepted]

    def _submit_all(self, submissions: list[Submission]) -> list[Any]:
        """What the script `submit` replies to each, or a fault in its place, in one round trip. Raises redis' faults.

        Where Sentinels watch, a replica has the jobs by then too, if one follows: else a primary that dies, or that
        has been replaced and does not know it yet, takes along what it has just said yes to. Sent again, to the one
        that Sentinels know by then, no job is queued twice.
        """
        give_up_at = time.monotonic() + REPLICATION_SECONDS
        while True:
            is_to_be_replicated = self._primary.is_watched and time.monotonic() > self._alone_until
            with self.redis.pipeline(transaction=False) as sending:
                for names, args in submissions:
                    self._submit(names, args, client=sending)
                if is_to_be_replicated:
                    sending.wait(1, WAIT_MS)
                replies = sending.execute(raise_on_error=False)
            if not is_to_be_replicated:
                return replies
            num_replicas = replies.pop()
            if not any(isinstance(reply, DEMOTED) for reply in replies):
                if num_replicas:
                    return replies
                if self._primary.is_alone():
                    self._alone_until = time.monotonic() + ALONE_SECONDS
                    return replies
            if time.monotonic() > give_up_at:
                raise RedisConnectionError(f"no replica had it within {REPLICATION_SECONDS:g} s")
            self._primary.changes += 1
            time.sleep(OUTAGE_PAUSE_SECONDS)

    def cancel(self, job_id: str, job: JobOutline, outcome_json: str) -> str | None:
        """Cancel by the script `end_queued`; returns the state the job was found in."""
        with reaching_redis("cancel the job"):
            return cast(str | None, self._end_queued(*self._cancellation(job_id, job, outcome_json)))

    def cancel_queued(self, jobs: Iterable[tuple[str, JobOutline, str]]) -> list[str | KeyeError | None]:
        """As `cancel` for each, in one round trip; those that run are not asked to stop."""
        with reaching_redis("cancel the jobs"), self.redis.pipeline(transaction=False) as cancelling:
            for names, args in starmap(self._cancellation, jobs):
                self._end_queued(names, [*args, "queued"], client=cancelling)
            replies = _passable(cancelling.execute(raise_on_error=False))
        return [unavailable("cancel the job", each) if isinstance(each, RedisError) else each for each in replies]

    def _cancellation(self, job_id: str, job: JobOutline, outcome_json: str) -> Submission:
        names = [keys.record(job_id), keys.events(job_id), keys.LEASES, keys.queued(job.priority), keys.DEADLINES]
        names += [keys.ENDED, keys.KEPT, keys.unheard(job.priority), keys.CANCELLATIONS]
        names += keys.idempotency_of(job.idempotency_key)
        ttls = self.result_ttl_seconds, job.result_ttl_seconds or ""
        return names, [job_id, JobState.CANCELLED.value, outcome_json, *ttls]

    def read_record(self, job_id: str, *fields: str) -> list[str]:
        """These fields of the job's record, "" for what is not there. Raises `JobNotFound` where the first is not."""
        with reaching_redis("read the job"):
            values = cast(list[str | None], self.redis.hmget(keys.record(job_id), list(fields)))
        if values[0] is None:
            raise JobNotFound.of(job_id)
        return [value or "" for value in values]

    def progress(self, job_id: str) -> list[Any]:
        """What the script `progress` finds. Raises `JobNotFound`."""
        names = [keys.record(job_id), keys.events(job_id), keys.LEASES, keys.ENDED, keys.CONTEXT]
        names += map(keys.queued, Priority)
        with reaching_redis("read the job"):
            found = cast(list[Any] | None, self._progress(keys=names, args=[job_id, MAX_PROGRESS_EVENTS]))
        if found is None:
            raise JobNotFound.of(job_id)
        return found

    def look(self, jobs: list[tuple[str, str]]) -> list[Look | KeyeError]:
        """See `keye.producer.reader.Streams`."""
        with reaching_redis("read the jobs"), self.redis.pipeline(transaction=False) as looking:
            for job_id, seen in jobs:
                # First: what comes behind it is told, and an end before the record is looked at is in the record.
                if seen:
                    looking.xrange(keys.events(job_id), seen, seen)
                    looking.xinfo_stream(keys.events(job_id))
                else:
                    looking.xrevrange(keys.events(job_id), count=1)
                looking.hmget(keys.record(job_id), "state", "deadline_at", "outcome")
            # Deadlines are times on the server's clock, and ours may be hours off.
            looking.time()
            *found, clock = _passable(self._executed(looking))
        now = -math.inf if isinstance(clock, RedisError) else clock[0]
        replies = iter(found)
        looks: list[Look | KeyeError] = []
        for _, seen in jobs:
            entries = next(replies)
            stream = next(replies) if seen else {}
            record = next(replies)
            fault = next((each for each in (entries, record) if isinstance(each, RedisError)), None)
            if fault:
                looks.append(unavailable("read the job", fault))
            else:
                state, deadline_at, outcome_json = record
                # A stream that nobody has written yet is an error.
                gone = () if isinstance(stream, RedisError) else _gone(stream)
                looks.append(Look(state, deadline_at, outcome_json, next(iter(entries), None), now, *gone))
        return looks

    def look_at_feed(self) -> FeedLook | KeyeError:
        """See `keye.producer.reader.Streams`."""
        try:
            with reaching_redis("read the feed of ended jobs"), self.redis.pipeline(transaction=False) as looking:
                looking.xinfo_stream(keys.ENDED)
                (feed,) = self._executed(looking)
                if isinstance(feed, RedisError):
                    raise feed
        except QueueUnavailable as fault:
            if "no such key" in str(fault.__cause__):
                # None has ended yet.
                return FeedLook(BEGINNING, BEGINNING, 0, num_trimmed=0)
            if not is_refusal(fault):
                raise
            return fault
        newest = feed["last-generated-id"]
        oldest = feed["first-entry"][0] if feed["first-entry"] else newest
        # Servers before 7.0 do not tell how many there were.
        num_added, length = feed.get("entries-added"), feed["length"]
        return FeedLook(oldest, newest, length, None if num_added is None else num_added - length)

    def read(
        self, streams: dict[str, str], max_entries: int, block_seconds: float | None
    ) -> dict[str, list[Entry] | KeyeError]:
        """See `keye.producer.reader.Streams`."""
        # Zero would block for ever, and longer than the socket's timeout, which the URL may set, looks like an outage.
        longest = self.redis.get_connection_kwargs()["socket_timeout"] / 2
        block_ms = None if block_seconds is None else max(1, int(min(block_seconds, longest) * 1000))
        try:
            with reaching_redis("read the jobs' events"):
                return _entries(self.redis.xread(dict[Any, Any](streams), count=max_entries, block=block_ms))
        except QueueUnavailable as fault:
            if not is_refusal(fault):
                raise
        # One of them is no stream: the others' callers need not hear of it.
        with reaching_redis("read the jobs' events"), self.redis.pipeline(transaction=False) as reading:
            for stream, seen in streams.items():
                reading.xread({stream: seen}, count=max_entries)
            replies = _passable(reading.execute(raise_on_error=False))
        found: dict[str, list[Entry] | KeyeError] = {}
        for stream, reply in zip(streams, replies, strict=True):
            found |= {stream: unavailable("read", reply)} if isinstance(reply, RedisError) else _entries(reply)
        return found

    def _executed(self, looking: Pipeline) -> list[Any]:
        """Its replies, faults among them. Whoever only reads would never hear that the server is a replica by now, and
        be told of what the new one does late or not at all: so a write of nothing goes along."""
        looking.expire(keys.reader("nobody"), WAKE_TTL_SECONDS)
        return looking.execute(raise_on_error=False)[:-1]

    def wake(self, stream: str) -> None:
        """See `keye.producer.reader.Streams`."""
        # Where it fails, the read ends by itself a little later.
        with suppress(RedisError), self.redis.pipeline(transaction=False) as waking:
            waking.xadd(stream, {"": ""}, maxlen=1)
            waking.expire(stream, WAKE_TTL_SECONDS)
            waking.execute()

    def let_go(self, job_ids: Iterable[str]) -> None:
        """See `Client.let_go`."""
        with reaching_redis("let go of the jobs"), self.redis.pipeline(transaction=False) as pipe:
            for each in job_ids:
                # Apart: as the page had it before, a producer has the right to the first two alone.
                for names in ([keys.record(each), keys.events(each)], [result_key(each)]):
                    self._release(names, [RELEASED_SECONDS], client=pipe)
            pipe.execute(raise_on_error=False)

    def kept_seconds(self) -> float:
        """See `Client.kept_seconds`."""
        with reaching_redis("be read"):
            return float(self.redis.hget(keys.KEPT, "result") or self.result_ttl_seconds)

    def close(self) -> None:
        self.reader.close()
        self.redis.close()

    def _submission(self, sealed: SealedJob, retry_failed: bool) -> Submission:
        """Keys and arguments of the script `submit`. Raises `InvalidJob` where Redis takes none of that size."""
        job, job_id, record = sealed.job, sealed.job_id, sealed.record
        queued = sorted(Priority, key=lambda priority: priority is not job.priority)
        names = [keys.record(job_id), keys.CONTEXT, message_list(job.priority), keys.DEADLINES, keys.ENDED, keys.LEASES]
        names += [*map(keys.queued, queued), *keys.idempotency_of(job.idempotency_key)]
        if retry_failed and job.idempotency_key is not None:
            names.append(keys.record(""))
        fingerprint = "" if job.idempotency_key is None else fingerprint_of(job)
        args: list[str | float] = [job_id, fingerprint, least_tokens(job), job.deadline_seconds or ""]
        args += [message(job_id, record["sealed"], job.priority), self.max_queue_depth or ""]
        args += chain.from_iterable(record.items())
        try:
            check_arguments(self.redis, args)
        except ArgumentTooLarge as fault:
            raise InvalidJob(
                f"1 fault: job: its message has {fault}. Upload media that it holds inside (data: URIs) and give their "
                "URIs, or have that setting raised."
            ) from None
        return names, args

    def _answer(self, sealed: SealedJob, reply: list[str] | RedisError) -> str | Refusal:
        """The id in the script's reply, or what `Transport.submit` raises."""
        job = sealed.job
        match reply:
            case RedisError() as error:
                return unavailable("queue the job", error)
            case ["too_long", context]:
                asked = job.by_question()
                longest = max(range(len(asked)), key=lambda index: least_tokens(asked[index]))
                new = asked[longest].generation.max_new_tokens
                place = f"questions.{longest}" if job.questions else "job"
                return InvalidJob(
                    f"1 fault: {place}: at least {least_tokens(job)} tokens, {new} of them new "
                    f"(generation.max_new_tokens); beside the chat template the workers hold {context} for one job. "
                    "Lower max_new_tokens, or shorten the text"
                )
            case ["full", depth, seconds]:
                limit = self.max_queue_depth or 0
                wait = max(1.0, (int(depth) - limit + 1) * float(seconds)) if seconds else RETRY_AFTER_SECONDS
                return QueueFull(
                    f"{depth} jobs are queued, the limit is {limit} (KEYE_MAX_QUEUE_DEPTH). Try again in {wait:.0f} s.",
                    wait,
                )
            case [_, entry]:
                job_id, fingerprint = entry.split(" ")
        if job_id != sealed.job_id and fingerprint != fingerprint_of(job):
            return IdempotencyConflict(
                f"The idempotency key {job.idempotency_key!r} belongs to a job that asks for something else. "
                "Send the same job again, or use another key."
            )
        return job_id


@contextmanager
def reaching_redis(action: str) -> Iterator[None]:
    """Redis' errors become `QueueUnavailable`; `action` completes "Redis could not ..."."""
    try:
        yield
    except RedisError as error:
        raise unavailable(action, error) from error


def unavailable(action: str, cause: RedisError) -> QueueUnavailable:
    remedy = "Check KEYE_REDIS_URL and that the server runs."
    if isinstance(cause, RedisConnectionError) and "No connection available" in str(cause):
        busy = "all connections of this process stayed in use"
        remedy = "Ask from fewer threads at once, or allow more (?max_connections= in KEYE_REDIS_URL)."
        return QueueUnavailable(f"Redis could not {action} ({busy}). {remedy}")
    if sentence := refusal_of(cause):
        return QueueUnavailable(f"Redis could not {action}. {sentence}")
    if isinstance(cause, OutOfMemoryError):
        remedy = "It is full: give it more memory, or keep results for less long (KEYE_RESULT_TTL_SECONDS)."
    return QueueUnavailable(f"Redis could not {action} ({str(cause).rstrip('.')}). {remedy}")


def is_refusal(fault: QueueUnavailable) -> bool:
    """Whether Redis is there, and will not answer another time either."""
    return isinstance(fault.__cause__, ResponseError) and not passes(fault.__cause__)


def _passable(replies: list[Any]) -> list[Any]:
    """The replies, unless there is a fault among them that is not one reply's alone."""
    for reply in replies:
        if isinstance(reply, RedisError) and passes(reply):
            raise reply
    return replies


def _gone(stream: Any) -> tuple[str, int | None] | tuple[()]:
    """The id of the oldest event of a job that is left, and how many there were before it; None for an unknown number.

    `stream` is what XINFO says. Before 7.0 that is not how many there were: whether any is gone, the first tells.
    """
    if not stream or not stream["first-entry"]:
        return ()
    oldest, fields = stream["first-entry"]
    if "entries-added" in stream:
        return oldest, stream["entries-added"] - stream["length"]
    try:
        first = read_event(fields["event"])
    except (ValidationError, KeyError):
        return oldest, 0
    # A stream is cut where hundreds lie behind: not among an attempt's first stages.
    is_whole = isinstance(first, JobEnded) or (isinstance(first, StageStarted) and first.attempt <= 1)
    return oldest, 0 if is_whole else None


def _entries(reply: Any) -> dict[str, list[Entry] | KeyeError]:
    # RESP2 answers with pairs of a stream and its entries, RESP3 with a map to lists of lists of them.
    if isinstance(reply, dict):
        return {stream: entries for stream, (entries,) in reply.items()}
    return dict(reply or ())
