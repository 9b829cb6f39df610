"""Claims: who may run a job, and as which attempt. Renewing is `renewal`, settling `results.settlement`."""

import json
import math
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Annotated, Literal, Self, TypeVar, cast

from pydantic import Field
from redis import Redis

from keye.config import keys
from keye.config.codes import Stage
from keye.config.connection import Patience, check_arguments
from keye.config.job import Priority
from keye.config.outcome import OUTCOME, JobFailure, Outcome
from keye.config.presence import EXPIRY_SECONDS
from keye.config.scripts import load_script
from keye.config.topology import (
    LISTENER,
    LISTENERS,
    QUEUE,
    SHARED_UNACKED,
    SHARED_UNACKED_INDEX,
    message,
    message_list,
)
from keye.config.wire import Outline, SealedJob, record_of

T = TypeVar("T")

_CLAIM_KEYS = (keys.TAKEN, keys.DEADLINES, *map(keys.queued, Priority))

TAKEN_TTL_SECONDS = 7 * 86400

# Settling needs it no more, and a spool on disk should not hold it: signed URLs stand in it.
Unsaved = Annotated[T, Field(exclude=True)]


@dataclass(frozen=True, slots=True)
class QueuedJob:
    """What a delivery says about its job: `record` is written where there is none, unless there was (`is_recorded`).

    `is_newer` is one whose schema version only later releases know. `delivery_tag` is of the message that is to be
    acknowledged with the outcome, "" where none is.
    """

    job_id: str
    record: Mapping[str, str]
    idempotency_key: str | None = None
    result_ttl_seconds: int | None = None
    is_newer: bool = False
    is_recorded: bool = False
    delivery_tag: str = ""

    @classmethod
    def of(cls, sealed: SealedJob) -> Self:
        return cls(sealed.job_id, sealed.record, sealed.job.idempotency_key, sealed.job.result_ttl_seconds)

    @classmethod
    def unreadable(cls, outline: Outline, job_id: str, payload_json: str, is_newer: bool = False) -> Self:
        """A job that is left to others or claimed only to be failed. Its key, where it has one, must end with it."""
        job = outline.job
        record = record_of(job, outline.submitted_at, payload_json)
        return cls(job_id, record, job.idempotency_key, job.result_ttl_seconds, is_newer)


@dataclass(frozen=True, slots=True)
class Claimed:
    """The right to settle one job, for as long as `token` is the record's newest. Times are the server's Unix seconds.

    Every move of a lease makes a new token, drawn at random: a counter could repeat after a server that lost its last
    second. `max_attempts` is the job's own and one more for each that does not count. `submitted_at` and
    `deadline_at`, None where unknown or unset, are as a producer that is not ours wrote them. `max_visual_tokens` is
    set where an earlier attempt had more and did not fit into memory, `unreachable_since` where `num_unreachable`
    earlier ones did not get the media; it is the end of the first. `sealed_json` is what the record says is asked,
    `canvas_json` what is to be called afterwards, if anything is; `delivery_tag` is the `QueuedJob`'s.
    """

    job_id: str
    token: str
    attempt: int
    max_attempts: int
    claimed_at: float
    submitted_at: float | None
    deadline_at: float | None
    idempotency_key: str | None
    result_ttl_seconds: int | None = None
    max_visual_tokens: int | None = None
    unreachable_since: Unsaved[float | None] = None
    num_unreachable: Unsaved[int] = 0
    sealed_json: Unsaved[str] = field(default="null", repr=False, compare=False)
    canvas_json: Unsaved[str | None] = field(default=None, repr=False, compare=False)
    delivery_tag: Unsaved[str] = field(default="", compare=False)

    @property
    def queued_seconds(self) -> float:
        return 0.0 if self.submitted_at is None else max(0.0, self.claimed_at - self.submitted_at)

    @property
    def seconds_to_deadline(self) -> float | None:
        """Counted from the claim; negative when it came too late."""
        return None if self.deadline_at is None else self.deadline_at - self.claimed_at


@dataclass(frozen=True, slots=True)
class AlreadySettled:
    """Another attempt, a cancel or the reaper ended the job: this delivery has nothing to do."""

    outcome: Outcome
    canvas_json: str | None = None


@dataclass(frozen=True, slots=True)
class HeldElsewhere:
    """Some worker is on it, or its attempt is not due yet; when it is, the reaper publishes the job again."""


@dataclass(frozen=True, slots=True)
class Forgotten:
    """The job has ended, so long ago that its record is gone: this delivery has nothing to do."""


@dataclass(frozen=True, slots=True)
class Suspect:
    """It may have killed its workers, so it runs alone: claim it again when nothing runs beside it."""


@dataclass(frozen=True, slots=True)
class Requeued:
    """A job that needs a message, and is reaped again if it gets none.

    Its worker died, or (`dead_worker` is None) another attempt is due, its producer died before it was published, its
    message was lost, or it ended while it waited. `stage` is the last that the dead worker told of, in `attempt`.
    """

    job_id: str
    sealed_json: str
    dead_worker: str | None
    priority: str
    token: str
    stage: Stage = Stage.QUEUED
    attempt: int = 0


@dataclass(frozen=True, slots=True)
class LateJob:
    """One whose deadline has passed, and that had not ended a moment ago; `attempt` is its last, 0 where none began."""

    job_id: str
    sealed_json: str
    attempt: int


@dataclass(frozen=True, slots=True)
class TakenOver:
    """A dead worker's job that may not run again: the reaper now holds it and must settle it.

    `stage` is the last one the dead worker told of.
    """

    lease: Claimed
    dead_worker: str
    stage: Stage
    cancel_requested: bool


Renewal = Literal["renewed", "cancelled", "lost"]
Interruption = Literal["cancelled", "lost", "drained"]
Postponement = Literal["queued", "cancelled", "lost"]


class LeaseStore:
    """Every move of a lease, each one atomic script on the server's clock."""

    def __init__(self, redis: Redis, lease_seconds: float) -> None:
        self.redis = redis
        self.lease_seconds = lease_seconds
        self.patience = Patience()
        moves = ("claim", "leave", "renew", "retry", "requeue", "turn", "reap", "sweep", "publish", "adopt", "tidy")
        self._run = {move: load_script(redis, move) for move in moves}

    def claim(
        self, job: QueuedJob, worker: str, is_alone: bool = False
    ) -> Claimed | AlreadySettled | HeldElsewhere | Forgotten | Suspect:
        """Begin the next attempt at `job`, unless it is running or over, or `is_alone` would have to be true.

        Waits out an outage of Redis as `patience` does; a claim whose answer was lost in it is not a second one.
        """
        names = [*_job_keys(job.job_id), *_CLAIM_KEYS]
        token = new_token()
        args: list[str | float] = [job.job_id, worker, self.lease_seconds, int(is_alone), token]
        claiming = f"claiming job {job.job_id}"
        answer = self.patience.wait_out(lambda: self._run["claim"](names, args), claiming)
        if answer == ["unknown"] and not job.is_recorded:
            # Not sent at once: our producers have written it, and it is most of what would travel.
            args += chain.from_iterable(job.record.items())
            answer = self.patience.wait_out(lambda: self._run["claim"](names, args), claiming)
        match answer:
            case ["claimed", sealed_json, canvas_json, *facts]:
                return _claimed(job, token, sealed_json, facts, canvas_json or None)
            case ["settled", outcome, canvas_json]:
                return AlreadySettled(OUTCOME.validate_json(outcome), canvas_json or None)
            case ["suspect"]:
                return Suspect()
            case ["unknown"]:
                return Forgotten()
            case _:
                return HeldElsewhere()

    def sealed(self, job_id: str) -> str | None:
        """What the job's record says is asked (JSON); None where it has none."""
        reading = f"reading job {job_id}"
        return cast(str | None, self.patience.wait_out(lambda: self.redis.hget(keys.record(job_id), "sealed"), reading))

    def canvas_is_called(self, job_id: str) -> None:
        """Nobody is to call it once more."""
        with self.redis.pipeline() as closing:
            closing.hdel(keys.record(job_id), "canvas")
            closing.zrem(keys.LEASES, job_id)
            closing.execute()

    def leave(self, job: QueuedJob, patience_seconds: float) -> float | None:
        """Leave a queued job to other workers, to be published again soon; waits out an outage as `claim` does.

        Returns for how many seconds it was left before; None once that is `patience_seconds`, or where it does not
        wait: then a claim tells the rest.
        """
        names = [keys.record(job.job_id), keys.LEASES, keys.queued(job.record["priority"]), keys.DEADLINES]
        args: list[str | float] = [job.job_id, patience_seconds, job.record["deadline_at"]]
        if not job.is_recorded:
            args += chain.from_iterable(job.record.items())
        left = self.patience.wait_out(lambda: self._run["leave"](names, args), f"leaving job {job.job_id}")
        return None if left is None else float(left)

    def renew(self, leases: list[Claimed]) -> list[Renewal]:
        """Extend all of them in one round trip; the answers are in their order."""
        names = [keys.LEASES, *(keys.record(lease.job_id) for lease in leases)]
        holders = [part for lease in leases for part in (lease.job_id, lease.token)]
        return list(self._run["renew"](names, [self.lease_seconds, *holders])) if leases else []

    def retry(
        self,
        lease: Claimed,
        failure: JobFailure,
        pause_seconds: float,
        max_visual_tokens: int | None,
        counts: bool = True,
    ) -> Postponement:
        """Give the lease up and queue the job for another attempt, `pause_seconds` from now at the earliest.

        Where this one does not count, the job may have one more.
        Where the caller has cancelled meanwhile ("cancelled") the lease is kept and the job is still to be settled.
        """
        reason = (failure.stage.value, failure.code.value, failure.message)
        limit = "" if max_visual_tokens is None else max_visual_tokens
        args = [lease.job_id, lease.token, pause_seconds, *reason, limit, new_token(), int(not counts)]
        return cast(Postponement, self._run["retry"](_job_keys(lease.job_id), args))

    def requeue(self, leases: list[Claimed]) -> list[Postponement]:
        """As `retry`, at once, at the head of the queue and without counting the attempts: their worker ends.

        They are the next to be taken of their priority, in the order in which they came into the queue, among those
        that other workers have given back.
        """
        if not leases:
            return []
        with self.redis.pipeline(transaction=False) as reading:
            for lease in leases:
                reading.hmget(keys.record(lease.job_id), ["sealed", "priority"])
            records = reading.execute()
        names: list[str] = [keys.LEASES, keys.record("")]
        args: list[str | float] = [2 * self.lease_seconds]
        for lease, (sealed_json, priority) in zip(leases, records, strict=True):
            priority = Priority(priority or Priority.NORMAL)
            names += [keys.record(lease.job_id), keys.events(lease.job_id), message_list(priority)]
            args += [lease.job_id, lease.token, new_token(), self._message(lease.job_id, sealed_json, priority)]
        return list(self._run["requeue"](names, args))

    def take_turn(self, reaper: str, turn_seconds: float) -> tuple[bool, float]:
        """Whether it is this reaper's turn to look around, for so long; and what the server's clock shows."""
        is_ours, now = self._run["turn"]([keys.REAPER_TURN], [reaper, int(turn_seconds * 1000)])
        return bool(is_ours), float(now)

    def due(self, found_in: str, limit: int, latest: float = math.inf) -> list[str]:
        """Ids of jobs whose time among the leases, or the deadlines, has passed, whether they wait or run.

        Longest ago first. What the server's clock shows counts up to `latest`: see `reap`.
        """
        now = min(self._now(), latest)
        return cast(list[str], self.redis.zrangebyscore(found_in, "-inf", now, start=0, num=limit))

    def reap(self, job_id: str, reaper: str, latest: float = math.inf) -> Requeued | TakenOver | None:
        """Take the job from its dead holder, or find that it is due; None when nothing is overdue (any more).

        `latest` is what the server's clock shows at the most if nobody has set it (Unix seconds): a lease that ends
        later is its holder's, who will renew it, whatever that clock shows.
        """
        token = new_token()
        match self._run["reap"](_job_keys(job_id), [job_id, reaper, self.lease_seconds, token, latest]):
            case ["requeued", dead_worker, sealed_json, priority, newest, stage, attempt]:
                last = (Stage(stage or Stage.QUEUED), int(attempt))
                return Requeued(job_id, sealed_json, dead_worker or None, priority, newest, *last)
            case ["taken_over", dead_worker, sealed_json, cancel_requested, stage, *facts]:
                lease = _claimed(QueuedJob(job_id, {}), token, sealed_json, facts)
                return TakenOver(lease, dead_worker, Stage(stage), bool(cancel_requested))
            case _:
                return None

    def publish(self, requeued: Requeued) -> None:
        """Give the job its message, behind those that wait, unless it was claimed by another meanwhile."""
        priority = Priority(requeued.priority)
        names = [keys.record(requeued.job_id), keys.LEASES, keys.queued(priority), message_list(priority)]
        names.append(keys.unheard(priority))
        body = self._message(requeued.job_id, requeued.sealed_json, priority)
        self._run["publish"](names, [requeued.job_id, requeued.token, body])

    def sweep(self, limit: int, missed_before: Iterable[str] = ()) -> tuple[list[str], list[str]]:
        """Make queued jobs whose message was lost overdue; returns their ids, and those to name the next time.

        A message may be on its way for two leases: taken by a worker that died before the claim, it comes back then.
        """
        lost: list[str] = []
        missed: list[str] = []
        for priority in Priority:
            names = [keys.queued(priority), keys.TAKEN, keys.LEASES, message_list(priority), keys.unheard(priority)]
            names.append(keys.record(""))
            found = self._run["sweep"](names, [priority.value, 2 * self.lease_seconds, limit, *missed_before])
            lost, missed = lost + found[0], missed + found[1]
        return lost, missed

    def adopt(self, first: int) -> tuple[int, int]:
        """Hand messages that dead workers of 0.2 held out again: how many, and the `first` to look at the next time.

        Two leases after they were taken: one that is alive has handed them out after one.
        """
        names = [SHARED_UNACKED, SHARED_UNACKED_INDEX, *map(message_list, Priority)]
        num_adopted, first = self._run["adopt"](names, [2 * self.lease_seconds, f', "", "{QUEUE}"]', first, 20])
        return int(num_adopted), int(first)

    def tidy(self, limit: int) -> None:
        """Take away what outlived the jobs and workers it is of; of dead letters without a job so many at a time."""
        names = [keys.DEAD_LETTERS, keys.TAKEN, keys.ENDED, keys.QUARANTINE, keys.KEPT, keys.NODES, LISTENERS]
        names.append(keys.record(""))
        self._run["tidy"](names, [limit, EXPIRY_SECONDS, TAKEN_TTL_SECONDS, *LISTENER])

    def read_late(self, job_id: str) -> LateJob:
        sealed_json, attempts = cast(list[str | None], self.redis.hmget(keys.record(job_id), ["sealed", "attempts"]))
        return LateJob(job_id, sealed_json or "null", int(attempts or 0))

    def postpone(self, job_id: str, found_in: str) -> None:
        """Let a job that was due be so again in a lease's time."""
        self.redis.zadd(found_in, {job_id: self._now() + self.lease_seconds}, xx=True)

    def _message(self, job_id: str, sealed_json: str | None, priority: Priority) -> str:
        """Without the job where it cannot be read, or would be more than Redis takes: what counts is the record."""
        try:
            whole = message(job_id, json.loads(sealed_json or ""), priority)
            check_arguments(self.redis, (whole,))
        except ValueError:  # `ArgumentTooLarge` is one
            return message(job_id, None, priority)
        return whole

    def _now(self) -> float:
        seconds, microseconds = self.redis.time()
        return seconds + microseconds / 1e6


def new_token() -> str:
    return secrets.token_hex(8)


def _job_keys(job_id: str) -> list[str]:
    return [keys.record(job_id), keys.events(job_id), keys.LEASES]


def _claimed(job: QueuedJob, token: str, sealed_json: str, facts: list[str], canvas_json: str | None = None) -> Claimed:
    attempt, max_attempts, claimed_at, submitted_at, deadline_at, max_visual_tokens, *unreachable = facts
    unreachable_since, num_unreachable = unreachable
    return Claimed(
        job_id=job.job_id,
        token=token,
        attempt=int(attempt),
        max_attempts=int(max_attempts),
        claimed_at=float(claimed_at),
        submitted_at=float(submitted_at) if submitted_at else None,
        deadline_at=float(deadline_at) if deadline_at else None,
        max_visual_tokens=int(max_visual_tokens) if max_visual_tokens else None,
        unreachable_since=float(unreachable_since) if unreachable_since else None,
        num_unreachable=int(num_unreachable or 0),
        idempotency_key=job.idempotency_key,
        result_ttl_seconds=job.result_ttl_seconds,
        sealed_json=sealed_json,
        canvas_json=canvas_json,
        delivery_tag=job.delivery_tag,
    )
