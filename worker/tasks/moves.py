"""The record in the log of each move that a job makes: which state it is in from there on, and why.

Which job it is stands in each by `keye.worker.telemetry.log.about`.
"""

import logging
import time

from keye.config.codes import JobState, Stage
from keye.config.outcome import JobFailure, Outcome
from keye.worker.leases.job_lease import Claimed

log = logging.getLogger(__name__)


def log_claim(lease: Claimed) -> None:
    log.info("job %s: running, attempt %d", lease.job_id, lease.attempt, extra={"state": JobState.RUNNING})


def log_stage(lease: Claimed, stage: Stage) -> None:
    facts = {"state": JobState.RUNNING, "stage": stage}
    log.debug("job %s: stage %s, attempt %d", lease.job_id, stage, lease.attempt, extra=facts)


def log_given_back(lease: Claimed, stage: Stage) -> None:
    facts = {"state": JobState.QUEUED, "stage": stage}
    log.info("job %s: given back in stage %s, this worker ends", lease.job_id, stage, extra=facts)


def log_retry(lease: Claimed, failure: JobFailure, pause_seconds: float) -> None:
    """`due_at` is Unix seconds, of this machine's clock."""
    facts = {"state": JobState.QUEUED, "stage": failure.stage, "code": failure.code}
    log.info(
        "job %s: attempt %d failed in %s, again in %.1f s: %s: %r",
        *(lease.job_id, lease.attempt, failure.stage, pause_seconds, failure.code, failure.message),
        extra=facts | {"due_at": round(time.time() + pause_seconds, 3)},
    )


def log_end(outcome: Outcome) -> None:
    why, facts = "", {"state": str(outcome.state)}
    if isinstance(outcome, JobFailure):
        facts |= {"stage": outcome.stage, "code": outcome.code}
        # Quoted and cut: it may name what a caller named, line breaks and all.
        why = f" in {outcome.stage}: {outcome.code}: {outcome.message!r:.500}"
    log.info("job %s: %s, attempt %d%s", outcome.job_id, outcome.state, outcome.attempts, why, extra=facts)
