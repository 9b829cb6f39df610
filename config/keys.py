"""Every Redis key of ours, its type and its lifetime. Celery's own keys (the queue, its results) are not here."""

PREFIX = "keye:"


def record(job_id: str) -> str:
    """Hash, the truth about one job. No expiry until settled, then `result_ttl_seconds`.

    Fields: state, sealed (the JSON of `wire.SealedJob`), priority, submitted_at, deadline_at ("" for none),
    attempts, max_attempts, token (fencing token of the newest claim), claimed_at, worker,
    outcome (JSON, once final), ended_at.
    """
    return f"{PREFIX}job:{job_id}"


def events(job_id: str) -> str:
    """Stream of `config.event` JSON in field `event`; lives as long as the record."""
    return f"{PREFIX}job:{job_id}:events"


def leases() -> str:
    """Sorted set of the running jobs' ids by the end of their lease, Unix seconds of the server's clock."""
    return f"{PREFIX}leases"


def idempotency(key: str) -> str:
    """String, `job_id fingerprint` of the first job sent under this key; lives as long as that job's record."""
    return f"{PREFIX}idempotency:{key}"


def worker(host: str, pid: int) -> str:
    """String, JSON of `worker.telemetry.presence.Presence`; expires when the process stops renewing it."""
    return f"{PREFIX}worker:{host}:{pid}"
