"""Writes how a job ended: outcome, last event, state and expiry in one move that only the lease holder may make."""

from redis import Redis

from config import keys
from config.outcome import JobFailure, JobResult
from worker.leases.connection import PATIENCE_SECONDS, patiently
from worker.leases.job_lease import Claimed
from worker.leases.lua import load_script


class Settlement:
    """Settles jobs; an ended job can be read for `result_ttl_seconds`, a failed one for as long as a dead letter."""

    def __init__(self, redis: Redis, result_ttl_seconds: int, dead_letter_ttl_seconds: int) -> None:
        self._settle = load_script(redis, "settle")
        self._result_ttl_seconds = result_ttl_seconds
        self._dead_letter_ttl_seconds = dead_letter_ttl_seconds

    def settle(
        self, lease: Claimed, outcome: JobResult | JobFailure, patience_seconds: float = PATIENCE_SECONDS
    ) -> bool:
        """Write the outcome, or return False where the lease was lost and another attempt will write its own.

        Waits out an outage of Redis for `patience_seconds`, then raises its fault.
        """
        names = [keys.record(lease.job_id), keys.events(lease.job_id), keys.leases(), keys.dead_letters()]
        if lease.idempotency_key is not None:
            names.append(keys.idempotency(lease.idempotency_key))
        told = (outcome.state.value, outcome.model_dump_json())
        args = (lease.job_id, lease.token, *told, self._result_ttl_seconds, self._dead_letter_ttl_seconds)
        return bool(patiently(lambda: self._settle(names, args), f"settling job {lease.job_id}", patience_seconds))
