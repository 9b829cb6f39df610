"""A handle on one submitted job: its state, progress, events, outcome. Any process may hold one for the same job."""

import logging
from collections.abc import Iterable, Iterator
from enum import StrEnum
from itertools import islice
from typing import overload

from redis.client import Pipeline

from keye.config import keys
from keye.config.codes import ErrorCode, JobState, Stage
from keye.config.event import EventsMissing, Heartbeat, JobEvent
from keye.config.faults import JobFailed, JobNotFound, JobUnreadable, KeyeError
from keye.config.outcome import JobFailure, JobResult, log_end
from keye.config.wire import JobOutline, Outline, read_sealed
from keye.producer.following import BEGINNING, End, EndsFollowing, EventsFollowing, Follow, order_of, taken
from keye.producer.progress import Progress
from keye.producer.records import ask_each
from keye.producer.transport import Transport, reaching_redis

log = logging.getLogger(__name__)

# Of jobs that are cancelled together, as they were sent, media inside them and all.
SEALED_PER_ROUND_TRIP = 50


class Cancellation(StrEnum):
    """What `Job.cancel` did, or `Client.cancel_queued`, which alone leaves a job running."""

    CANCELLED = "cancelled"
    REQUESTED = "requested"
    ALREADY_ENDED = "already_ended"
    LEFT_RUNNING = "left_running"


class Job:
    """One job. Reading it never changes it; every method raises `JobNotFound` once its record has expired."""

    def __init__(self, job_id: str, transport: Transport) -> None:
        self.id = job_id
        self._transport = transport

    def __repr__(self) -> str:
        return f"Job({self.id!r})"

    @property
    def state(self) -> JobState:
        """The state now, read from Redis each time."""
        (state,) = self._transport.read_record(self.id, "state")
        return JobState(state)

    @property
    def progress(self) -> Progress:
        """How far it is, read from Redis each time."""
        found = self._transport.progress(self.id)
        try:
            return Progress.of(found)
        except ValueError:
            raise JobUnreadable.of(self.id, "record") from None

    @overload
    def events(self, timeout: float | None = None, after: str | None = None) -> Iterator[JobEvent | EventsMissing]: ...

    @overload
    def events(
        self, timeout: float | None = None, after: str | None = None, *, heartbeat_seconds: float
    ) -> Iterator[JobEvent | EventsMissing | Heartbeat]: ...

    def events(
        self, timeout: float | None = None, after: str | None = None, heartbeat_seconds: float | None = None
    ) -> Iterator[JobEvent | EventsMissing | Heartbeat]:
        """Everything the worker said about the job from its start, then live until it ends; late readers miss nothing.

        Behind the event whose `id` is `after`, where it is given; else from the first. A `Heartbeat` comes whenever
        nothing was said for `heartbeat_seconds`, so that who writes on to somebody notices when he has left.
        When an attempt fails or loses its worker, the next one begins with a `StageStarted` of a higher `attempt`, and
        its text from nothing: drop what the attempts before it wrote. No event of an older attempt follows.
        Of a job that says more than 10,000 the first go: `EventsMissing` tells who has missed some, and how many.

        Raises `InvalidEventId`, `JobNotEnded` after `timeout` seconds, and within a minute when the job's deadline
        has passed and no worker is alive to end it, and `QueueUnavailable` when Redis stays away for a minute. None
        otherwise waits as long as it takes.
        """
        return taken(self.follow_events(timeout, after, heartbeat_seconds))

    def result(self, timeout: float | None = None) -> JobResult:
        """The job's result, waited for.

        Raises `JobFailed` with the typed failure when the job ended without an answer, `JobNotEnded` (a
        `TimeoutError`) and `QueueUnavailable` as `events` does.
        """
        ((_, end),) = taken(self.follow_end(timeout))
        return result_of(end)

    def follow_events(self, timeout: float | None, after: str | None, heartbeat_seconds: float | None) -> Follow:
        seen = BEGINNING if after is None else after
        order_of(seen)
        return lambda wake: self._transport.reader.follow(
            EventsFollowing(self.id, seen, wake, timeout, heartbeat_seconds)
        )

    def follow_end(self, timeout: float | None) -> Follow:
        return lambda wake: self._transport.reader.follow(EndsFollowing([self.id], wake, timeout))

    def cancel(self) -> Cancellation:
        """Cancel the job.

        A queued job is cancelled for good (CANCELLED), and this process' log says so; the worker of a running one is
        asked to stop, which takes it no longer than the stage or the engine's step it is in, and `result` tells whether
        it did (REQUESTED); an ended job stays as it ended (ALREADY_ENDED).
        """
        sealed_json, attempts = self._transport.read_record(self.id, "sealed", "attempts")
        job, failure = _end_in_queue(self.id, sealed_json, attempts)
        found = self._transport.cancel(self.id, job, failure.model_dump_json())
        if found is None:
            raise JobNotFound.of(self.id)
        return _what_was_done(found, job, failure)


def cancel_queued(transport: Transport, job_ids: Iterable[str]) -> Iterator[tuple[str, Cancellation | KeyeError]]:
    """See `Client.cancel_queued`."""
    remaining = iter(job_ids)
    while batch := list(islice(remaining, SEALED_PER_ROUND_TRIP)):
        with reaching_redis("read the jobs"):
            read = ask_each(transport.redis, batch, len(batch), _ask_for_sealed)
            ends = [(job_id, *_end_in_queue(job_id, *(values or (None, None)))) for job_id, (values,) in read]
        found = transport.cancel_queued([(job_id, job, end.model_dump_json()) for job_id, job, end in ends])
        for (job_id, job, failure), reply in zip(ends, found, strict=True):
            if reply is None or isinstance(reply, KeyeError):
                yield job_id, reply or JobNotFound.of(job_id)
            else:
                done = _what_was_done(reply, job, failure)
                yield job_id, Cancellation.LEFT_RUNNING if done is Cancellation.REQUESTED else done


def _ask_for_sealed(reading: Pipeline, job_id: str) -> None:
    reading.hmget(keys.record(job_id), ["sealed", "attempts"])


def _end_in_queue(job_id: str, sealed_json: str | None, attempts: str | None) -> tuple[JobOutline, JobFailure]:
    """What can be told of the job, and its outcome should it be cancelled now."""
    job = Outline.of(read_sealed(sealed_json)).job
    return job, JobFailure(
        job_id=job_id,
        code=ErrorCode.CANCELLED,
        message="The caller cancelled the job while it was queued.",
        stage=Stage.QUEUED,
        retryable=False,
        attempts=int(attempts or 0),
        metadata=job.metadata,
    )


def _what_was_done(found: str, job: JobOutline, failure: JobFailure) -> Cancellation:
    """To a job that was found in this state."""
    match found:
        case JobState.QUEUED:
            log_end(log, failure, **({"traceparent": job.traceparent} if job.traceparent else {}))
            return Cancellation.CANCELLED
        # A job that was cancelled before is cancelled: asking twice, or a reply that was lost, is no news.
        case JobState.CANCELLED:
            return Cancellation.CANCELLED
        case JobState.RUNNING:
            return Cancellation.REQUESTED
        case _:
            return Cancellation.ALREADY_ENDED


def result_of(end: End) -> JobResult:
    """The result; raises what is in its place."""
    if isinstance(end, JobFailure):
        raise JobFailed.of(end)
    if isinstance(end, Exception):
        # Many may wait for it, and each would add to it where he was.
        raise end.with_traceback(None)
    return end
