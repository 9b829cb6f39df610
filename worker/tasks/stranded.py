"""The end of a job that nobody has and that may not run again. Finding such jobs is the reaper's."""

import json
import logging
from dataclasses import replace

from keye.config.codes import ErrorCode, Stage
from keye.config.faults import Fault
from keye.config.outcome import JobFailure
from keye.config.wire import JobOutline, Outline
from keye.worker.leases.job_lease import LateJob, TakenOver
from keye.worker.results.settlement import Settlement
from keye.worker.tasks.fault import failure_of

log = logging.getLogger(__name__)


class StrandedJobs:
    """Makes dead letters and expires for the reaper; both raise when Redis is away, and are then called again."""

    def __init__(self, settlement: Settlement) -> None:
        self._settlement = settlement

    def dead_letter(self, taken: TakenOver) -> None:
        """End a job that may not run again as failed, or as cancelled where its caller wanted that."""
        job = _outline(taken.sealed_json)
        lease = replace(taken.lease, idempotency_key=job.idempotency_key)
        if taken.cancel_requested:
            fault = Fault(ErrorCode.CANCELLED, "The caller cancelled the job; its worker died before it could stop.")
        else:
            fault = Fault(
                ErrorCode.WORKER_LOST,
                f"Worker {taken.dead_worker} died under the job in stage {taken.stage.value}. That was attempt "
                f"{lease.attempt}, the last that max_attempts allows. Its log tells why; send the job again if it may.",
            )
        self._settlement.settle(lease, failure_of(fault, taken.stage, lease, job))

    def expire(self, late: LateJob) -> None:
        """End a job whose deadline passed while it waited; of a running one its worker ends it."""
        job = _outline(late.sealed_json)
        failure = JobFailure(
            job_id=late.job_id,
            code=ErrorCode.DEADLINE_EXCEEDED,
            message="The job's deadline_seconds were over while it was queued. Give it longer, or add workers.",
            stage=Stage.QUEUED,
            retryable=False,
            attempts=late.attempts,
            metadata=job.metadata,
        )
        if self._settlement.expire(failure, job):
            log.info("job %s: %s while it was queued", late.job_id, failure.state)


def _outline(sealed_json: str) -> JobOutline:
    """Enough to end a job, also one that cannot be read, of another schema version perhaps."""
    try:
        return Outline.of(json.loads(sealed_json)).job
    except ValueError:
        return JobOutline()
