"""The record in the log of each move that an attempt makes: which state the job is in from there on, and why.

Which job it is stands in each by `keye.worker.telemetry.log.about`. How it ended is told by `results.settlement`.
"""

import logging
import time

from keye.config.codes import JobState, Stage
from keye.config.outcome import JobFailure
from keye.worker.leases.claims import Claimed

log = logging.getLogger(__name__)


def log_claim(lease: Claimed) -> None:
    log.info("job %s: running, attempt %d", lease.job_id, lease.attempt, extra={"state": JobState.RUNNING})


def log_stage(lease: Claimed, stage: Stage) -> None:
    facts = {"state": JobState.RUNNING, "stage": stage}
    log.debug("job %s: stage %s, attempt %d", lease.job_id, stage, lease.attempt, extra=facts)


def log_given_back(lease: Claimed, stage: Stage, why: str = "this worker ends") -> None:
    facts = {"state": JobState.QUEUED, "stage": stage}
    log.info("job %s: given back in stage %s, %s", lease.job_id, stage, why, extra=facts)


def log_retry(lease: Claimed, failure: JobFailure, pause_seconds: float) -> None:
    """`due_at` is Unix seconds, of this machine's clock."""
    facts = {"state": JobState.QUEUED, "stage": failure.stage, "code": failure.code}
    log.info(
        "job %s: attempt %d failed in %s, again in %.1f s: %s: %r",
        *(lease.job_id, lease.attempt, failure.stage, pause_seconds, failure.code, failure.message),
        extra=facts | {"due_at": round(time.time() + pause_seconds, 3)},
    )
