"""Hands outcomes to the settlement through any outage: what Redis does not take is kept on disk until it does."""

import logging
from collections.abc import Sequence

from redis.exceptions import RedisError

from keye.config.outcome import JobFailure, JobResult
from keye.worker.leases.connection import PATIENCE_SECONDS, Patience, passes
from keye.worker.leases.job_lease import Claimed
from keye.worker.results.outcome_size import OutcomeTooLarge
from keye.worker.results.settlement import Settlement
from keye.worker.results.spool import Spool, Verdict

log = logging.getLogger(__name__)


class Outbox:
    """`settle` is for who ran the job, `deliver` for whoever comes after an outage, in this process or the next."""

    def __init__(self, settlement: Settlement, spool: Spool, patience: Patience) -> None:
        self._settlement = settlement
        self._spool = spool
        self._patience = patience

    def settle(
        self,
        lease: Claimed,
        outcome: JobResult | JobFailure,
        last_events: Sequence[str] = (),
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> bool:
        """As `Settlement.settle`, but waits out an outage of Redis, and raises its fault once patience ends.

        The caller may then go on with other work: the outcome stays on disk to be delivered.
        """
        try:
            return self._settlement.settle(lease, outcome, last_events)
        except RedisError as fault:
            if not passes(fault):
                raise
        self._spool.keep(Verdict(lease=lease, outcome=outcome, last_events=tuple(last_events)))
        settling = f"settling job {lease.job_id}"
        try:
            is_written = self._patience.wait_out(
                lambda: self._settlement.settle(lease, outcome, last_events), settling, patience_seconds
            )
        except OutcomeTooLarge:
            self._spool.drop(lease.token)
            raise
        self._spool.drop(lease.token)
        return is_written

    def deliver(self) -> None:
        """Write what is kept on disk, where its claim still counts. Raises the fault of a Redis that is away.

        What is too large for it ends its job as failed: tried for ever, it would hold up the others.
        """
        for verdict in self._spool.waiting():
            lease, outcome = verdict.lease, verdict.outcome
            try:
                is_written = self._settlement.settle(lease, outcome, verdict.last_events)
            except OutcomeTooLarge as fault:
                log.error("job %s: %s", lease.job_id, fault)
                outcome = fault.failure
                is_written = self._settlement.settle(lease, outcome, verdict.last_events)
            if is_written:
                log.info("job %s: outcome kept on disk is written, %s", lease.job_id, outcome.state)
            else:
                log.warning("job %s: outcome kept on disk is discarded, the job went on without it", lease.job_id)
            self._spool.drop(lease.token)
