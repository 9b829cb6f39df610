"""What becomes of a job that nobody has: its message again, or its end. Finding such jobs is the reaper's."""

import json
import logging
from dataclasses import replace

from celery import Celery

from config.error_codes import ErrorCode
from config.event import Stage
from config.job import AnalysisJob, Priority
from config.outcome import JobFailure
from config.topology import ANALYZE_TASK, PRIORITY_STEPS, QUEUE
from config.wire import InvalidJob, UnknownSchemaVersion, open_sealed
from worker.leases.job_lease import LateJob, Requeued, TakenOver
from worker.results.settlement import Settlement
from worker.tasks.fault import JobFault, failure_of

log = logging.getLogger(__name__)


class StrandedJobs:
    """Publishes, buries and expires for the reaper; all raise when Redis is away, and are then called again."""

    def __init__(self, app: Celery, settlement: Settlement) -> None:
        self._app = app
        self._settlement = settlement

    def publish(self, requeued: Requeued) -> None:
        """A requeued job waits behind the jobs of its priority that are already there."""
        self._publish(requeued.job_id, requeued.sealed_json)

    def bury(self, taken: TakenOver) -> None:
        """End a job that may not run again."""
        job = _read(taken.sealed_json)
        lease = taken.lease if job is None else replace(taken.lease, idempotency_key=job.idempotency_key)
        if taken.cancel_requested:
            fault = JobFault(ErrorCode.CANCELLED, "The caller cancelled the job; its worker died before it could stop.")
        else:
            fault = JobFault(
                ErrorCode.WORKER_LOST,
                f"Worker {taken.dead_worker} died under the job in stage {taken.stage.value}. That was attempt "
                f"{lease.attempt}, the last that max_attempts allows. Its log tells why; send the job again if it may.",
            )
        if self._settlement.settle(lease, failure_of(fault, taken.stage, lease, job), patience_seconds=0):
            # Whoever receives it finds the job settled and stores that as the Celery result.
            self._publish(lease.job_id, taken.sealed_json)

    def expire(self, late: LateJob) -> None:
        """End a job whose deadline passed while it waited; of a running one its worker ends it."""
        job = _read(late.sealed_json)
        failure = JobFailure(
            job_id=late.job_id,
            code=ErrorCode.DEADLINE_EXCEEDED,
            message="The job's deadline_seconds were over while it was queued. Give it longer, or add workers.",
            stage=Stage.QUEUED,
            retryable=False,
            attempts=late.attempts,
            metadata={} if job is None else job.metadata,
        )
        if self._settlement.expire(failure, job):
            log.info("job %s: %s while it was queued", late.job_id, failure.state)

    def _publish(self, job_id: str, sealed_json: str) -> None:
        job = _read(sealed_json)
        self._app.send_task(
            ANALYZE_TASK,
            kwargs={"sealed": json.loads(sealed_json)},
            # The headers would repeat the whole job, signed URLs included.
            kwargsrepr="{...}",
            task_id=job_id,
            queue=QUEUE,
            priority=PRIORITY_STEPS[Priority.NORMAL if job is None else job.priority],
        )


def _read(sealed_json: str) -> AnalysisJob | None:
    """None for a job of another schema version: it is passed on as it is."""
    try:
        return open_sealed(json.loads(sealed_json)).job
    except (InvalidJob, UnknownSchemaVersion):
        return None
