"""Whether every job is in a legal state: all records, leases, queues and dead letters are read and held against it.

Anybody may have written what lies in the queue: it is read as bytes, and whatever it is, it stops nothing here.
"""

import json
import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from redis import Redis
from redis.client import NEVER_DECODE

from keye.config import keys
from keye.config.codes import JobState
from keye.config.job import Priority
from keye.config.outcome import OUTCOME
from keye.config.scripts import load_script
from keye.config.topology import QUEUE, SHARED_UNACKED, UNACKED, job_named_by, message_lists
from keye.config.wire import MAX_JSON_PARTS, MAX_SEALED_BYTES
from keye.producer.records import Record, read_records

_FIELDS = ("state", "priority", "attempts", "max_attempts", "deadline_at", "outcome", "ended_at", "requeued_as")
_NEVER = -1
# What looks odd for an instant, between two moves of a living job, is gone by the second look.
LOOK_AGAIN_SECONDS = 1.0

# The least that KEYE_DEAD_LETTER_TTL_SECONDS may be.
SHORTEST_KEPT_SECONDS = 60.0

# A message that a worker reads is smaller, as base64 and with all that is beside it.
_MAX_MESSAGE_BYTES = 2 * MAX_SEALED_BYTES
_PAGE_BYTES = 8 * 2**20


class Irregularity(NamedTuple):
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
    records: dict[str, Record]
    ttls: dict[str, int]
    leases: dict[str, float]
    queued: dict[str, float]
    unheard: frozenset[str]
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
    if suspected := set(judge(ledger, lease_seconds)):
        time.sleep(LOOK_AGAIN_SECONDS)
        ledger = read_ledger(redis)
        suspected &= set(judge(ledger, lease_seconds))
    return ledger, sorted(suspected)


def judge(ledger: Ledger, lease_seconds: float) -> Iterator[Irregularity]:
    """Pure. What a living worker puts right within two leases is no irregularity until then."""
    overdue = ledger.now - 2 * lease_seconds
    for job_id, record in ledger.records.items():
        try:
            faults = list(_faults(ledger, job_id, record, overdue))
        except ValueError:
            # Its numbers are none, or its outcome: somebody else has written into it, or a newer release.
            faults = [f"{record['state']} with a record that this release cannot read"]
        yield from (Irregularity(job_id, what) for what in faults)
    if None in ledger.messages:
        yield Irregularity(
            "-",
            f"a message in {QUEUE} names no job or cannot be read: somebody else's? Workers put it into quarantine "
            "(keye dead list --messages)",
        )
    without_record = {
        "has a lease and no record": {job_id for job_id, ends_at in ledger.leases.items() if ends_at < overdue},
        "is listed as queued and has no record": ledger.queued.keys(),
        "is listed as a deadline and has no record": ledger.deadlines.keys(),
    }
    for what, job_ids in without_record.items():
        for job_id in job_ids - ledger.records.keys():
            yield Irregularity(job_id, what)


def _faults(ledger: Ledger, job_id: str, record: Record, overdue: float) -> Iterator[str]:
    """What is wrong with one job: all that must not be of one in its state, and whether it is."""
    state, outcome = record["state"], record["outcome"]
    has_lease, is_listed, expires = job_id in ledger.leases, job_id in ledger.queued, ledger.ttls[job_id] != _NEVER
    is_lease_overdue = ledger.leases.get(job_id, math.inf) < overdue
    match state:
        case JobState.QUEUED:
            is_overlooked = not ledger.messages and ledger.queued.get(job_id, math.inf) < 2 * overdue - ledger.now
            faults = {
                ", and its message was due long ago: is any worker alive?": is_lease_overdue,
                ", its message is lost and nobody has noticed: is any worker alive?": not has_lease and is_overlooked,
                " without a message, and nobody will publish one": not (
                    has_lease or is_listed or job_id in ledger.messages
                ),
                " without an attempt left": int(record["attempts"] or 0) >= int(record["max_attempts"] or 1),
                " past its deadline: is any worker alive?": float(record["deadline_at"] or math.inf) < overdue,
            }
        case JobState.RUNNING:
            faults = {
                " without a lease: nobody notices when its worker dies": not has_lease,
                ", and its lease ended long ago: is any worker alive?": is_lease_overdue,
                ", and listed as queued too": is_listed,
            }
        case JobState.SUCCEEDED | JobState.FAILED | JobState.CANCELLED | JobState.EXPIRED:
            outcome_state = None if outcome is None else OUTCOME.validate_json(outcome).state
            is_dead_letter = job_id in ledger.dead_letters
            # Later its time as one may be over, which is shorter than its record's where somebody set it so.
            is_fresh = ledger.now - float(record["ended_at"] or 0) < SHORTEST_KEPT_SECONDS
            may_be_one = state == JobState.FAILED and record["requeued_as"] is None
            faults = {
                " without an outcome": outcome is None,
                ", and its outcome says otherwise": outcome_state not in (None, state),
                " without a time": record["ended_at"] is None,
                ", and its record never expires": not expires and job_id not in ledger.unheard,
                ", and still listed as queued": is_listed,
                ", and a dead letter": is_dead_letter and not may_be_one,
                ", and no dead letter": may_be_one and is_fresh and not is_dead_letter,
            }
        case _:
            yield f"{state!r} is no state of a job"
            return
    if state in (JobState.QUEUED, JobState.RUNNING):
        faults[", and yet it has an outcome"] = outcome is not None
        faults[", and its record expires before it has ended"] = expires
    yield from (f"{state}{what}" for what, is_so in faults.items() if is_so)


def read_ledger(redis: Redis) -> Ledger:
    """Read everything; in no single instant, so a job on its way may look odd."""
    seconds, microseconds = redis.time()
    leases, deadlines, dead = (_scores(redis, name) for name in (keys.LEASES, keys.DEADLINES, keys.DEAD_LETTERS))
    queued = {job_id: at for priority in Priority for job_id, at in _scores(redis, keys.queued(priority)).items()}
    unheard = frozenset(job_id for priority in Priority for job_id in _scores(redis, keys.unheard(priority)))
    messages = frozenset(_messages(redis))
    num_quarantined = redis.xlen(keys.QUARANTINE)
    records: dict[str, Record] = {}
    ttls: dict[str, int] = {}
    for job_id, record, ttl in read_records(redis, _FIELDS):
        records[job_id], ttls[job_id] = record, ttl
    now = seconds + microseconds / 1e6
    return Ledger(now, records, ttls, leases, queued, unheard, deadlines, dead, messages, num_quarantined)


def _scores(redis: Redis, name: str) -> dict[str, float]:
    return dict(cast(list[tuple[str, float]], redis.zrange(name, 0, -1, withscores=True)))


def _messages(redis: Redis) -> Iterator[str | None]:
    """The job of each message of ours, waiting or in a worker's hands."""
    for name in message_lists():
        for raw in _waiting(redis, name):
            yield job_named_by(_parsed(raw))
    for name in (UNACKED, SHARED_UNACKED):
        for raw in _taken(redis, name):
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


def _taken(redis: Redis, name: str) -> Iterator[bytes | None]:
    """What lies there, one by one, since other apps may have thousands in theirs; without what is too large."""
    tags = _fetch_bytes(redis, "HKEYS", name)
    with redis.pipeline(transaction=False) as measuring:
        for tag in tags:
            measuring.hstrlen(name, tag)
        sizes = measuring.execute()
    for tag, size in zip(tags, sizes, strict=True):
        if size <= _MAX_MESSAGE_BYTES:
            yield _fetch_bytes(redis, "HGET", name, tag)


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
