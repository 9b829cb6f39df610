"""From whatever was raised under a job to the code and the sentence its caller reads."""

from copy import copy

from pydantic import JsonValue

from keye.config.codes import ErrorCode, Stage
from keye.config.faults import Fault
from keye.config.outcome import JobFailure
from keye.worker.host_fault import HostFault
from keye.worker.leases.claims import Claimed, LateJob

CANCELLED_WHILE_RUNNING = "The caller cancelled the job while it ran."
CANCELLED_BEFORE = "The caller cancelled the job before it ran."
ANOTHERS_ID = "The message's job_id is that of another job. Give each job an id of its own, the task's is best."


def explain(error: BaseException) -> Fault:
    """Never the text of an unexpected error: it may hold what only the operator should read, and the log has it."""
    if isinstance(error, Fault):
        # Without its traceback: that leads to the media of the attempt, which would live until a search for cycles.
        return copy(error)
    return Fault(
        ErrorCode.INTERNAL,
        f"The worker failed with {type(error).__name__}. Its log has the traceback beside this job's id.",
    )


def fault_met(host_fault: HostFault, lease: Claimed, place: str) -> Fault:
    """What its caller is told of a job that met this fault in a place where other work passed."""
    num_times, num_places = 1 + sum(lease.host_faults.values()), len({*lease.host_faults, place})
    return Fault(
        ErrorCode.HOST_FAULT,
        f"The job met a fault of the worker's host, {host_fault.kind}, {num_times} times on {num_places} "
        f"{'worker' if num_places == 1 else 'workers'}, the last time with nothing beside it; other work passes there. "
        "Send less in one job, or media that are smaller.",
    )


def failure_of(fault: Fault, stage: Stage, lease: Claimed | LateJob, metadata: dict[str, JsonValue]) -> JobFailure:
    """The outcome that tells the caller; `metadata` is the job's, empty where it could not be read."""
    return JobFailure(
        job_id=lease.job_id,
        code=fault.code,
        message=fault.message,
        stage=stage,
        retryable=fault.code.facts.retryable,
        attempts=lease.attempt,
        media_index=fault.media_index,
        partial=fault.partial,
        metadata=metadata,
    )
