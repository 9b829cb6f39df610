"""Jobs that are ended from outside: those of attempts that outlive their time because nothing of ours runs in their
thread, and those that nobody has and that may not run again. Finding the latter is the reaper's.
"""

import logging
import time
from dataclasses import replace
from weakref import WeakSet

from redis.exceptions import RedisError

from keye.config.codes import ErrorCode, Stage
from keye.config.faults import Fault
from keye.config.wire import Outline, read_sealed
from keye.worker.leases.claims import Claimed, LateJob, TakenOver
from keye.worker.results.settlement import Settlement
from keye.worker.tasks.attempt import Attempt
from keye.worker.tasks.fault import failure_of
from keye.worker.tasks.lookahead import Lookahead
from keye.worker.telemetry.log import about

log = logging.getLogger(__name__)

# Every stage that looks at the clock has ended by then.
GRACE_SECONDS = 3.0


class Stragglers:
    """Ended from one thread that is none of theirs."""

    def __init__(self, settlement: Settlement, lookahead: Lookahead) -> None:
        self._settlement = settlement
        self._lookahead = lookahead
        # An attempt may end by itself just before it is noted here, and nobody would take it out.
        self._ended: WeakSet[Attempt] = WeakSet()

    def end_overdue(self) -> dict[Claimed, float]:
        """End the jobs whose time is over; returns those whose threads run on, and for how many seconds beyond it."""
        now = time.monotonic()
        seconds_over = {attempt: now - attempt.ends_at for attempt in self._lookahead.attempts()}
        overdue = {attempt: seconds for attempt, seconds in seconds_over.items() if seconds > GRACE_SECONDS}
        try:
            for attempt in overdue:
                if attempt not in self._ended:
                    self._end(attempt)
        except RedisError as error:
            log.warning("%d jobs hang and cannot be ended while Redis is away: %s", len(overdue), error)
        return {attempt.lease: seconds for attempt, seconds in overdue.items()}

    def _end(self, attempt: Attempt) -> None:
        if (fault := attempt.fault_of_time()) is None:
            return
        failure = failure_of(fault, attempt.stage, attempt.lease, attempt.job.metadata)
        with about(job_id=failure.job_id, attempt=failure.attempts, traceparent=attempt.job.traceparent):
            if self._settlement.settle(attempt.lease, failure):
                log.error("job %s: hangs in %s, ended from outside", failure.job_id, failure.stage)
        self._ended.add(attempt)


def dead_letter(settlement: Settlement, taken: TakenOver) -> None:
    """End a job that may not run again as failed, or as cancelled where its caller wanted that."""
    job = Outline.of(read_sealed(taken.lease.sealed_json)).job
    lease = replace(taken.lease, idempotency_key=job.idempotency_key, result_ttl_seconds=job.result_ttl_seconds)
    if taken.cancel_requested:
        fault = Fault(ErrorCode.CANCELLED, "The caller cancelled the job; its worker died before it could stop.")
    else:
        fault = Fault(
            ErrorCode.WORKER_LOST,
            f"Worker {taken.dead_worker} died under the job in stage {taken.stage.value}. That was attempt "
            f"{lease.attempt}, the last that max_attempts allows. Its log tells why; send the job again if it may.",
        )
    failure = failure_of(fault, taken.stage, lease, job.metadata)
    settlement.settle(lease, failure)


def expire(settlement: Settlement, late: LateJob) -> None:
    """End a job whose deadline passed while it waited; of a running one its worker ends it."""
    job = Outline.of(read_sealed(late.sealed_json)).job
    fault = Fault(
        ErrorCode.DEADLINE_EXCEEDED,
        "The job's deadline_seconds were over while it was queued. Give it longer, or add workers.",
    )
    failure = failure_of(fault, Stage.QUEUED, late, job.metadata)
    with about(traceparent=job.traceparent):
        settlement.expire(failure, job)
