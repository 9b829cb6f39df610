"""A handle on one submitted job: its state, its events, its outcome. Any process may hold one for the same job."""

import json
import math
import time
from collections.abc import Iterator
from enum import StrEnum

from keye.config.codes import ErrorCode, JobState, Stage
from keye.config.event import JobEnded, JobEvent
from keye.config.faults import JobFailed, JobNotEnded, JobNotFound, QueueUnavailable
from keye.config.outcome import OUTCOME, JobFailure, JobResult
from keye.config.wire import Outline
from keye.producer.transport import Transport

# One blocking read; well below the socket's timeout, so that silence is not taken for a dead connection.
READ_SECONDS = 2.0
# A waiting caller sits out a restart or a failover of Redis up to this long.
OUTAGE_SECONDS = 60.0
OUTAGE_PAUSE_SECONDS = 0.5
# Workers end a job at its deadline. Who waits for this much longer hears that none is there to do it.
OVERDUE_SECONDS = 55.0


class Cancellation(StrEnum):
    """What `Job.cancel` did."""

    CANCELLED = "cancelled"
    REQUESTED = "requested"
    ALREADY_ENDED = "already_ended"


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
        return self._look()[0]

    def events(self, timeout: float | None = None) -> Iterator[JobEvent]:
        """Everything the worker said about the job from its start, then live until it ends; late readers miss nothing.

        When a worker dies under the job, the next attempt begins with a `StageStarted` of a higher `attempt`, and its
        text from nothing: drop what the attempts before it wrote. No event of an older attempt follows.

        Raises `JobNotEnded` after `timeout` seconds, and within a minute of the job's deadline when no worker is alive
        to end it; None otherwise waits as long as it takes.
        """
        started_at = answered_at = time.monotonic()
        seen = "0-0"
        attempt = 0
        while True:
            remaining = READ_SECONDS if timeout is None else timeout - (time.monotonic() - started_at)
            try:
                entries = self._transport.read_events(self.id, seen, min(READ_SECONDS, max(0.0, remaining)))
                ended = False
                if not entries:
                    state, deadline_at = self._look()
                    ended = state.is_final
                    if ended:
                        # The job ended after the read: its last events are there by now.
                        entries = self._transport.read_events(self.id, seen, None)
                    elif time.time() > deadline_at + OVERDUE_SECONDS:
                        raise JobNotEnded.of(self.id, state, "although its deadline has passed", "No worker is alive.")
                answered_at = time.monotonic()
            except QueueUnavailable:
                if remaining <= 0 or time.monotonic() - answered_at > OUTAGE_SECONDS:
                    raise
                time.sleep(min(OUTAGE_PAUSE_SECONDS, remaining))
                continue
            for entry_id, event in entries:
                seen = entry_id
                if event is None:
                    continue
                if isinstance(event, JobEnded):
                    ended = True
                elif event.attempt < attempt:
                    # From a worker that does not know yet that it lost the job.
                    continue
                else:
                    attempt = event.attempt
                yield event
            if ended:
                return
            if remaining <= 0:
                raise JobNotEnded.of(self.id, self.state, f"after {timeout or 0:g} s of waiting")

    def result(self, timeout: float | None = None) -> JobResult:
        """The job's result, waited for without polling.

        Raises `JobFailed` with the typed failure when the job ended without an answer, `JobNotEnded` (a
        `TimeoutError`) as `events` does, and `QueueUnavailable` when Redis stays away for a minute.
        """
        started_at = time.monotonic()
        for _ in self.events(timeout):
            pass
        ended_at = time.monotonic()
        patience = OUTAGE_SECONDS if timeout is None else min(OUTAGE_SECONDS, started_at + timeout - ended_at)
        while True:
            try:
                (outcome_json,) = self._transport.read_record(self.id, "outcome")
                break
            except QueueUnavailable:
                if time.monotonic() - ended_at > patience:
                    raise
                time.sleep(OUTAGE_PAUSE_SECONDS)
        outcome = OUTCOME.validate_json(outcome_json)
        if isinstance(outcome, JobFailure):
            raise JobFailed.of(outcome)
        return outcome

    def _look(self) -> tuple[JobState, float]:
        """The state now, and the deadline: Unix seconds of the submitter's clock, infinite where there is none."""
        state, deadline_at = self._transport.read_record(self.id, "state", "deadline_at")
        return JobState(state), float(deadline_at or math.inf)

    def cancel(self) -> Cancellation:
        """Cancel the job.

        A queued job is cancelled for good (CANCELLED); the worker of a running one is asked to stop, which takes it no
        longer than the stage or the engine's step it is in, and `result` tells whether it did (REQUESTED); an ended job
        stays as it ended (ALREADY_ENDED).
        """
        sealed_json, attempts = self._transport.read_record(self.id, "sealed", "attempts")
        job = Outline.of(json.loads(sealed_json)).job
        failure = JobFailure(
            job_id=self.id,
            code=ErrorCode.CANCELLED,
            message="The caller cancelled the job while it was queued.",
            stage=Stage.QUEUED,
            retryable=False,
            attempts=int(attempts or 0),
            metadata=job.metadata,
        )
        match self._transport.cancel(self.id, job, failure.model_dump_json()):
            case None:
                raise JobNotFound.of(self.id)
            # A job that was cancelled before is cancelled: asking twice, or a reply that was lost, is no news.
            case JobState.QUEUED | JobState.CANCELLED:
                return Cancellation.CANCELLED
            case JobState.RUNNING:
                return Cancellation.REQUESTED
            case _:
                return Cancellation.ALREADY_ENDED
