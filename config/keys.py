"""Every Redis key of ours, its type and its lifetime. Those that Celery makes (the queue, what is not acknowledged, its
results) are in `keye.config.topology`, and all of them begin with the settings' `key_prefix` if there is one."""

PREFIX = "keye:"

# Sorted set of job ids by the end of their lease, Unix seconds of the server's clock.
#
# Holds the running jobs, and those that need a message: queued ones that are not known to be published yet, or (then
# by the time it is due) wait for another attempt, and ended ones of which a worker must hear: they ended while they
# waited and have no Celery result, or something is to be called for them. The reaper looks after all that is overdue.
LEASES = f"{PREFIX}leases"

# Sorted set of the priorities by the publication time of the newest job that a worker took. A job that was
# published earlier and still waits has lost its message. Expires a week after the last worker.
TAKEN = f"{PREFIX}taken"

# Sorted set of the jobs that have a deadline and have not ended, by that deadline, Unix seconds.
DEADLINES = f"{PREFIX}deadlines"

# Sorted set of the ids of FAILED jobs by their end, Unix seconds of the server's clock. None counts any more once that
# is `dead_letter_ttl_seconds` ago, and workers take it out, as they do one whose record is gone.
DEAD_LETTERS = f"{PREFIX}dead"

# Hash of what workers' settings say, for who is no worker: for how many seconds an ended job can be read (result) and a
# failed one is a dead letter (dead_letter). Workers write it with their presence. Stays.
KEPT = f"{PREFIX}kept"

# Stream of messages that could not be read, the newest `keye.config.quarantine.MAX_MESSAGES` of them: fields
# reason, worker, job_id ("" for none), size, raw (base64 of its beginning). Each stays for `dead_letter_ttl_seconds`.
QUARANTINE = f"{PREFIX}quarantine"

# Stream of the jobs that ended, the newest 100,000 or a few more: fields job_id, state, seconds (since the last attempt
# began, "" for one that was ended in the queue). Each stays for the longer of `result_ttl_seconds` and
# `dead_letter_ttl_seconds`, the very newest until there is another.
ENDED = f"{PREFIX}ended"

# Hash of what each kind of job (`keye.config.wire.kind_of`) takes of a worker's time: the sums of weights, and of
# seconds times their weights, over the newest of its jobs. Stays.
WORK = f"{PREFIX}work"

# Sorted set of Celery's names for the workers by when each was last seen, Unix seconds of the server's clock.
NODES = f"{PREFIX}nodes"

# String, the worker whose turn it is to look for overdue leases; expires before the next turn, and one that would last
# longer does not count.
REAPER_TURN = f"{PREFIX}reaper-turn"

# Pub/sub channel: ids of running jobs the moment their callers cancel them. The record holds the request.
CANCELLATIONS = f"{PREFIX}cancellations"

# String, tokens that texts, media and answer of a job may have together, beside what the chat template writes: the
# smallest of the live workers', since any of them may get the job. They renew it with their presence, and it expires as
# that does.
CONTEXT = f"{PREFIX}context"

# Pattern that the presence keys (`worker`) of all workers match.
WORKERS = f"{PREFIX}worker:*"


def record(job_id: str) -> str:
    """Hash, the truth about one job. No expiry until it has ended and no message of it waits, then
    the job's own `result_ttl_seconds`. Where it has none, that of the workers' settings, whoever ends it, or, where it
    FAILED, their `dead_letter_ttl_seconds` if that is longer.

    Fields: state, sealed (the JSON of `wire.SealedJob`), kind (`wire.kind_of` it), priority, submitted_at,
    deadline_at ("" for none; both by the server's clock, or as a producer that is not ours wrote them),
    attempts, max_attempts, token (fencing token of the newest move of its lease), claimed_at, worker, lease_seconds
    (that worker's), cancel_requested (set while RUNNING), outcome (JSON, once final), ended_at, settler (a mark),
    attempt:<n> (JSON of `keye.config.outcome.FailedAttempt`, for each of the newest 50 that failed, died or was ended
    meanwhile),
    due_at (when the next attempt may begin, set by one that failed, or the first, where Celery's `eta` asks for it),
    pause_seconds (from the end of one that failed until then),
    kept_seconds and kept_key (of one that has ended and whose message waits: for how long it and its idempotency key
    stay once that is gone; until then they do not expire),
    canvas (JSON of `keye.worker.broker.canvas.Canvas`: what Celery is to call once it has ended, until it is called),
    max_visual_tokens (after one that did not fit), num_unreachable (attempts that did not get the media and were
    followed by another), unreachable_since (when the first of them ended, Unix seconds of the server's clock),
    waits (the attempt that waits for a place among few whose worker died once, for a decoder or for room in the engine,
    while it does), deaths (attempts that ended with their worker and did not wait), spared (those that did, or were
    fetching), is_republished (it was given a message again, and may have two),
    queued_at (when the message that was claimed last had come into its queue), given_back (the newest attempt that its
    worker gave back), host_faults (JSON: how often the job met a fault of a host that was then found fit, by place),
    left_seconds (that workers of an older release have left it to newer ones),
    requeued_as (the job that a dead letter was sent again as).
    """
    return f"{PREFIX}job:{job_id}"


def events(job_id: str) -> str:
    """Stream of `keye.config.event` JSON in field `event`; lives as long as the record.

    Holds about the 10,000 newest events: of a very long answer the beginning is then in the outcome only.
    """
    return f"{PREFIX}job:{job_id}:events"


def queued(priority: str) -> str:
    """Sorted set of the queued jobs whose message is known to be published, by when, Unix seconds of the server's
    clock. One for each priority, as Celery keeps its messages."""
    return f"{PREFIX}queued:{priority}"


def unheard(priority: str) -> str:
    """Sorted set of the ended jobs of a priority whose message waits in the queue, by when that was published: they do
    not expire, and their idempotency keys are not free, until it is taken or known to be lost."""
    return f"{PREFIX}unheard:{priority}"


def idempotency(key: str) -> str:
    """String, `job_id fingerprint` of the first job sent under this key; expires as its record does, or after
    `result_ttl_seconds` where that is a dead letter for longer."""
    return f"{PREFIX}idempotency:{key}"


def idempotency_of(key: str | None) -> list[str]:
    """The same as the last key of a script, which a job that was sent without one does not have."""
    return [] if key is None else [idempotency(key)]


def reader(name: str) -> str:
    """Stream of empty entries: each has one process' reader look again whom it waits for. Expires after a minute."""
    return f"{PREFIX}reader:{name}"


def worker(host: str, pid: int) -> str:
    """String, JSON of `keye.config.presence.Presence`; expires when the process stops renewing it."""
    return f"{PREFIX}worker:{host}:{pid}"
