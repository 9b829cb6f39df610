"""Many jobs at a glance: their records, read some at a time so that Redis has time for others in between.

Anybody may have written there: what cannot be read is told as such, and stops nothing.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from heapq import nlargest, nsmallest
from itertools import islice
from typing import Any, NamedTuple, TypeVar, cast

from pydantic import ValidationError
from redis import Redis
from redis.client import Pipeline
from redis.exceptions import RedisError

from keye.config import keys
from keye.config.codes import UNANSWERED, ErrorCode, JobState, Stage
from keye.config.contract import Report
from keye.config.outcome import OUTCOME, JobFailure
from keye.producer.progress import Progress

# Names that a SCAN looks at, and the most records that a round trip reads.
RECORDS_PER_ROUND_TRIP = 1000
# Of outcomes, which hold all that a job had written.
OUTCOMES_PER_ROUND_TRIP = 100
# Leases that are looked at for running jobs: the first to end, since those of jobs that are due later end later.
MAX_LEASES = 5000

_EVENTS = keys.events("").removeprefix(keys.record(""))
_FIELDS = ("state", "submitted_at", "claimed_at", "ended_at", "attempts", "worker")
_GONE = -2

# Fields of one; None for what is not there.
Record = dict[str, str | None]
T = TypeVar("T")


class JobSummary(Report):
    """One job in a line. Times are Unix seconds of the server's clock, by which it was submitted `age_seconds` ago.

    `worker` (host:pid) and `claimed_at` are the newest attempt's; `stage` and `num_tokens` are told of one that runs,
    `stage` and `code` of a job that ended without an answer. Of a record that is not `is_readable` what cannot be read
    is None.
    """

    job_id: str
    is_readable: bool = True
    state: JobState | None = None
    submitted_at: float | None = None
    age_seconds: float | None = None
    claimed_at: float | None = None
    ended_at: float | None = None
    attempt: int | None = None
    worker: str | None = None
    stage: Stage | None = None
    num_tokens: int | None = None
    code: ErrorCode | None = None


class Listing(NamedTuple):
    """The newest of the jobs that were asked for, newest first, and how many there are of them all."""

    jobs: list[JobSummary]
    num_found: int


def list_jobs(
    redis: Redis,
    states: Collection[str],
    codes: Collection[str],
    since_seconds: float | None,
    older_seconds: float | None,
    limit: int | None,
) -> Listing:
    """See `Client.list_jobs`. Raises Redis' fault."""
    now = _clock(redis)
    first = -math.inf if since_seconds is None else now - since_seconds
    end = math.inf if older_seconds is None else now - older_seconds
    submitted_at: dict[str, float] = {}
    for job_id, record, _ in read_records(redis, ("state", "submitted_at")):
        at = _number(record["submitted_at"])
        # One of which nobody knows counts as the oldest.
        at = -math.inf if at is None else at
        is_state_asked_for = not states or record["state"] in states
        if is_state_asked_for and first <= at < end and (not codes or record["state"] in UNANSWERED):
            submitted_at[job_id] = at
    if codes:
        ended = _outcomes(redis, list(submitted_at))
        submitted_at = {job_id: submitted_at[job_id] for job_id, failure in ended if failure.code in codes}
    num_shown = len(submitted_at) if limit is None else limit
    newest = nlargest(num_shown, submitted_at, key=submitted_at.__getitem__)
    return Listing(list(_summaries(redis, newest, now)), len(submitted_at))


def longest_running(redis: Redis, most: int) -> tuple[float, list[JobSummary]]:
    """The server's clock, and those of the running jobs whose attempt has run for longest. Raises Redis' fault."""
    now = _clock(redis)
    leased = cast(list[str], redis.zrange(keys.LEASES, 0, MAX_LEASES - 1))
    claimed_at = {
        job_id: _number(record["claimed_at"]) or now
        for job_id, record, _ in _read(redis, leased, ("state", "claimed_at"))
        if record["state"] == JobState.RUNNING
    }
    return now, list(_summaries(redis, nsmallest(most, claimed_at, key=claimed_at.__getitem__), now))


def read_records(redis: Redis, fields: Sequence[str]) -> Iterator[tuple[str, Record, int]]:
    """Of each job its id, these fields of its record, and for how many seconds that lives (-1: for ever).

    In no order and in no single instant, so that a job may come twice. In place of a record there may be anything: its
    fields are then None. Raises Redis' fault.
    """
    names = redis.scan_iter(match=keys.record("*"), count=RECORDS_PER_ROUND_TRIP)
    return _read(redis, (name.removeprefix(keys.record("")) for name in names if not name.endswith(_EVENTS)), fields)


def _read(redis: Redis, job_ids: Iterable[str], fields: Sequence[str]) -> Iterator[tuple[str, Record, int]]:
    def ask(reading: Pipeline, job_id: str) -> None:
        reading.hmget(keys.record(job_id), list(fields))
        reading.ttl(keys.record(job_id))

    for job_id, (values, ttl) in ask_each(redis, job_ids, RECORDS_PER_ROUND_TRIP, ask):
        if ttl != _GONE:
            yield job_id, dict(zip(fields, values or [None] * len(fields), strict=True)), ttl


def _summaries(redis: Redis, job_ids: Sequence[str], now: float) -> Iterator[JobSummary]:
    """In their order; without those that are gone meanwhile."""
    records = {job_id: record for job_id, record, _ in _read(redis, job_ids, _FIELDS)}
    running = [job_id for job_id, record in records.items() if record["state"] == JobState.RUNNING]
    # The newest tells all that is shown of an attempt.
    events = dict(ask_each(redis, running, RECORDS_PER_ROUND_TRIP, _ask_newest_event))
    outcomes = dict(_outcomes(redis, (job_id for job_id, record in records.items() if record["state"] in UNANSWERED)))
    for job_id, record in records.items():
        yield _summary(job_id, record, events.get(job_id, [[]])[0], outcomes.get(job_id), now)


def _summary(job_id: str, record: Record, newest: Any, failure: JobFailure | None, now: float) -> JobSummary:
    """`newest` has the newest event of one that runs, `failure` is how one ended without an answer."""
    state, attempts = record["state"], record["attempts"] or "0"
    times = {name: _number(record[name]) for name in ("submitted_at", "claimed_at", "ended_at")}
    is_readable = state is not None and not any(record[name] and at is None for name, at in times.items())
    told: dict[str, Any] = {**times, "state": state, "worker": record["worker"]}
    if times["submitted_at"] is not None:
        told["age_seconds"] = max(0.0, now - times["submitted_at"])
    try:
        told["attempt"] = int(attempts)
    except ValueError:
        is_readable = False
    if state in UNANSWERED:
        is_readable = is_readable and failure is not None
        told |= {} if failure is None else {"stage": failure.stage, "code": failure.code}
    elif state == JobState.RUNNING and is_readable:
        events = [fields.get("event", "") for _, fields in newest or ()]
        progress = Progress.of([state, attempts, "", now, "", "", "", True, *events])
        told |= {"stage": progress.stage, "num_tokens": progress.num_tokens}
    return JobSummary(job_id=job_id, is_readable=is_readable, **told)


def _outcomes(redis: Redis, job_ids: Iterable[str]) -> Iterator[tuple[str, JobFailure]]:
    """Of those whose outcome is a failure that can be read."""
    for job_id, (outcome_json,) in ask_each(redis, job_ids, OUTCOMES_PER_ROUND_TRIP, _ask_outcome):
        with suppress(ValidationError):
            if isinstance(outcome := OUTCOME.validate_json(outcome_json or ""), JobFailure):
                yield job_id, outcome


def _ask_outcome(reading: Pipeline, job_id: str) -> None:
    reading.hget(keys.record(job_id), "outcome")


def _ask_newest_event(reading: Pipeline, job_id: str) -> None:
    reading.xrevrange(keys.events(job_id), count=1)


def ask_each(
    redis: Redis, items: Iterable[T], per_round_trip: int, ask: Callable[[Pipeline, T], None]
) -> Iterator[tuple[T, list[Any]]]:
    """Each with the replies to what is asked of it; where something else lies than is looked for, None is the reply."""
    remaining = iter(items)
    while batch := list(islice(remaining, per_round_trip)):
        with redis.pipeline(transaction=False) as reading:
            for item in batch:
                ask(reading, item)
            replies = [_unless_odd(reply) for reply in reading.execute(raise_on_error=False)]
        num = len(replies) // len(batch)
        yield from ((item, replies[at * num : (at + 1) * num]) for at, item in enumerate(batch))


def _unless_odd(reply: Any) -> Any:
    if isinstance(reply, RedisError):
        if "WRONGTYPE" not in str(reply):
            raise reply
        return None
    return reply


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _clock(redis: Redis) -> float:
    seconds, microseconds = redis.time()
    return float(seconds + microseconds / 1e6)
