"""Whether every job is in a legal state: all records, leases, queues and dead letters are read and held against it.

Anybody may have written what lies in the queue: it is read as bytes, and whatever it is, it stops nothing here.
"""

import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from redis import Redis
from redis.client import NEVER_DECODE

from keye.config import keys
from keye.config.codes import JobState
from keye.config.job import Priority
from keye.config.outcome import OUTCOME
from keye.config.scripts import load_script
from keye.config.topology import QUEUE, UNACKED, job_named_by, message_lists
from keye.config.wire import MAX_JSON_PARTS, MAX_SEALED_BYTES

_FIELDS = ("state", "priority", "attempts", "max_attempts", "deadline_at", "outcome", "ended_at", "requeued_as")
_NEVER = -1
# What looks odd for an instant, between two moves of a living job, is gone by the second look.
LOOK_AGAIN_SECONDS = 1.0

# A message that a worker reads is smaller, as base64 and with all that is beside it.
_MAX_MESSAGE_BYTES = 2 * MAX_SEALED_BYTES
_PAGE_BYTES = 8 * 2**20


@dataclass(frozen=True, slots=True, order=True)
class Irregularity:
    """`job_id` is in no legal state; `what` says how, and what follows from it."""

    job_id: str
    what: str


@dataclass(frozen=True, slots=True)
class Ledger:
    """All that Redis holds of jobs, read at `now` (Unix seconds of its clock). `ttls` are the records' own.

    `messages` are the jobs that have one; None stands for messages that name no job. `num_quarantined` are those that
    workers could not read; their jobs have ended.
    """

    now: float
    records: dict[str, dict[str, str | None]]
    ttls: dict[str, int]
    leases: dict[str, float]
    queued: dict[str, float]
    deadlines: dict[str, float]
    dead_letters: dict[str, float]
    messages: frozenset[str | None]
    num_quarantined: int

    @property
    def num_in_state(self) -> Counter[str]:
        return Counter(record["state"] or "none" for record in self.records.values())


def verify(redis: Redis, lease_seconds: float) -> tuple[Ledger, list[Irregularity]]:
    """The state of all jobs, and what is wrong: what was at the first look and still is at a second."""
    ledger = read_ledger(redis)
    suspected = set(judge(ledger, lease_seconds))
    if suspected:
        time.sleep(LOOK_AGAIN_SECONDS)
        ledger = read_ledger(redis)
        suspected &= set(judge(ledger, lease_seconds))
    return ledger, sorted(suspected)


def judge(ledger: Ledger, lease_seconds: float) -> Iterator[Irregularity]:
    """Pure. What a living worker puts right within two leases is no irregularity until then."""
    overdue = ledger.now - 2 * lease_seconds
    for job_id, record in ledger.records.items():
        for what in _faults(ledger, job_id, record, overdue):
            yield Irregularity(job_id, what)
    for job_id, ends_at in ledger.leases.items():
        if job_id not in ledger.records and ends_at < overdue:
            yield Irregularity(job_id, "has a lease and no record")
    if None in ledger.messages:
        yield Irregularity(
            "-",
            f"a message in {QUEUE} names no job or cannot be read: somebody else's? Workers put it into quarantine "
            "(keye dead list --messages)",
        )
    for name, entries in (("queued", ledger.queued), ("a deadline", ledger.deadlines)):
        for job_id in entries.keys() - ledger.records.keys():
            yield Irregularity(job_id, f"is listed as {name} and has no record")


def _faults(ledger: Ledger, job_id: str, record: dict[str, str | None], overdue: float) -> Iterator[str]:
    match record["state"]:
        case JobState.QUEUED:
            yield from _faults_of_queued(ledger, job_id, record, overdue)
        case JobState.RUNNING:
            if job_id not in ledger.leases:
                yield "RUNNING without a lease: nobody notices when its worker dies"
            elif ledger.leases[job_id] < overdue:
                yield "RUNNING, and its lease ended long ago: is any worker alive?"
            if job_id in ledger.queued:
                yield "RUNNING, and listed as queued too"
        case JobState.SUCCEEDED | JobState.FAILED | JobState.CANCELLED | JobState.EXPIRED as state:
            yield from _faults_of_ended(ledger, job_id, record, JobState(state))
            return
        case state:
            yield f"{state!r} is no state of a job"
            return
    if record["outcome"] is not None:
        yield f"{record['state']}, and yet it has an outcome"
    if ledger.ttls[job_id] != _NEVER:
        yield f"{record['state']}, and its record expires before it has ended"


def _faults_of_queued(ledger: Ledger, job_id: str, record: dict[str, str | None], overdue: float) -> Iterator[str]:
    if job_id in ledger.leases:
        if ledger.leases[job_id] < overdue:
            yield "QUEUED, and its message was due long ago: is any worker alive?"
    elif job_id in ledger.queued:
        if not ledger.messages and ledger.queued[job_id] < 2 * overdue - ledger.now:
            yield "QUEUED, its message is lost and nobody has noticed: is any worker alive?"
    elif job_id not in ledger.messages:
        yield "QUEUED without a message, and nobody will publish one"
    if int(record["attempts"] or 0) >= int(record["max_attempts"] or 1):
        yield "QUEUED without an attempt left"
    if record["deadline_at"] and float(record["deadline_at"]) < overdue:
        yield "QUEUED past its deadline: is any worker alive?"


def _faults_of_ended(ledger: Ledger, job_id: str, record: dict[str, str | None], state: JobState) -> Iterator[str]:
    if record["outcome"] is None:
        yield f"{state} without an outcome"
    elif OUTCOME.validate_json(record["outcome"]).state is not state:
        yield f"{state}, and its outcome says otherwise"
    if record["ended_at"] is None:
        yield f"{state} without a time"
    if ledger.ttls[job_id] == _NEVER:
        yield f"{state}, and its record never expires"
    if job_id in ledger.queued:
        yield f"{state}, and still listed as queued"
    is_dead_letter = job_id in ledger.dead_letters
    if is_dead_letter != (state is JobState.FAILED and record["requeued_as"] is None):
        yield f"{state}, and a dead letter" if is_dead_letter else f"{state}, and no dead letter"


def read_ledger(redis: Redis) -> Ledger:
    """Read everything; in no single instant, so a job on its way may look odd."""
    seconds, microseconds = redis.time()
    leases, deadlines, dead = (_scores(redis, name) for name in (keys.leases(), keys.deadlines(), keys.dead_letters()))
    queued = {job_id: at for priority in Priority for job_id, at in _scores(redis, keys.queued(priority)).items()}
    messages = frozenset(_messages(redis))
    num_quarantined = redis.xlen(keys.quarantine())
    records: dict[str, dict[str, str | None]] = {}
    ttls: dict[str, int] = {}
    for name in redis.scan_iter(match=keys.record("*"), count=1000, _type="hash"):
        with redis.pipeline() as reading:
            reading.hmget(name, list(_FIELDS))
            reading.ttl(name)
            values, ttl = reading.execute()
        # Gone since: it expired.
        if any(value is not None for value in values):
            job_id = name.removeprefix(keys.record(""))
            records[job_id] = dict(zip(_FIELDS, values, strict=True))
            ttls[job_id] = ttl
    now = seconds + microseconds / 1e6
    return Ledger(now, records, ttls, leases, queued, deadlines, dead, messages, num_quarantined)


def _scores(redis: Redis, name: str) -> dict[str, float]:
    return dict(cast(list[tuple[str, float]], redis.zrange(name, 0, -1, withscores=True)))


def _messages(redis: Redis) -> Iterator[str | None]:
    """The job of each message of ours, waiting or in a worker's hands."""
    for name in message_lists():
        for raw in _waiting(redis, name):
            yield job_named_by(_parsed(raw))
    for raw in _taken(redis):
        match _parsed(raw):
            case [message, _, queue] if queue == QUEUE:
                yield job_named_by(message)


def _waiting(redis: Redis, name: str) -> Iterator[bytes | None]:
    """The messages of a list, some megabytes at a time; None for one that is too large.

    New ones may shift others, which then come twice.
    """
    script = load_script(redis, "messages").script
    start, count = 0, 1
    while page := _fetch_bytes(redis, "EVAL", script, 1, name, start, start + count - 1, _MAX_MESSAGE_BYTES):
        yield from page
        start += len(page)
        size = sum(_MAX_MESSAGE_BYTES if raw is None else len(raw) for raw in page)
        count = min(2 * count, 100) if size < _PAGE_BYTES else max(count // 2, 1)


def _taken(redis: Redis) -> Iterator[bytes | None]:
    """What lies in `UNACKED`, one by one, since other apps may have thousands there; without what is too large."""
    tags = _fetch_bytes(redis, "HKEYS", UNACKED)
    with redis.pipeline(transaction=False) as measuring:
        for tag in tags:
            measuring.hstrlen(UNACKED, tag)
        sizes = measuring.execute()
    for tag, size in zip(tags, sizes, strict=True):
        if size <= _MAX_MESSAGE_BYTES:
            yield _fetch_bytes(redis, "HGET", UNACKED, tag)


def _fetch_bytes(redis: Redis, *command: Any) -> Any:
    """The answer as it is, on a connection that decodes the others."""
    return cast(Any, redis).execute_command(*command, **{NEVER_DECODE: True})


def _parsed(raw: bytes | None) -> Any:
    """Decoded JSON; None for anything else, and for what would take gigabytes."""
    if raw is None or sum(raw.count(mark) for mark in (b",", b"[", b"{")) > MAX_JSON_PARTS:
        return None
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None
