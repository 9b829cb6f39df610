"""Claims: who may run a job, and as which attempt. Renewing is `renewal`, settling `results.settlement`."""

import json
import math
import secrets
from collections.abc import Iterable
from itertools import chain
from typing import Literal, cast

from redis import Redis

from keye.config import keys
from keye.config.codes import Stage
from keye.config.connection import Patience, check_arguments
from keye.config.job import Priority
from keye.config.outcome import OUTCOME, JobFailure
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
from keye.worker.leases.claims import (
    AlreadySettled,
    Claimed,
    Forgotten,
    HeldElsewhere,
    LateJob,
    QueuedJob,
    Requeued,
    Suspect,
    TakenOver,
)

_CLAIM_KEYS = (keys.TAKEN, keys.DEADLINES, *map(keys.queued, Priority))

TAKEN_TTL_SECONDS = 7 * 86400

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
        self, job: QueuedJob, worker: str, is_alone: bool = False, in_company: bool = False
    ) -> Claimed | AlreadySettled | HeldElsewhere | Forgotten | Suspect:
        """Begin the next attempt at `job`, unless it is running or over, or `is_alone` would have to be true.

        Who runs it `in_company` lets one whose worker died once wait for its place among few such: `Claimed.waits`.

        Waits out an outage of Redis as `patience` does; a claim whose answer was lost in it is not a second one.
        """
        names = [*_job_keys(job.job_id), *_CLAIM_KEYS]
        token = new_token()
        beside = "nothing" if is_alone else "company" if in_company else "any"
        args: list[str | float] = [job.job_id, worker, self.lease_seconds, beside, token]
        claiming = f"claiming job {job.job_id}"
        answer = self.patience.wait_out(lambda: self._run["claim"](names, args), claiming)
        if answer == ["unknown"] and not job.is_recorded:
            # Not sent at once: our producers have written it, and it is most of what would travel.
            args += chain.from_iterable(job.record.items())
            answer = self.patience.wait_out(lambda: self._run["claim"](names, args), claiming)
        match answer:
            case ["claimed", sealed_json, canvas_json, *facts]:
                return _claimed(job, token, sealed_json, facts, canvas_json or None, is_alone)
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

    def requeue(self, leases: list[Claimed], host_fault: str = "", place: str = "") -> list[Postponement]:
        """As `retry`, at once, at the head of the queue and without counting the attempts: their worker ends, or it met
        `host_fault` (JSON: stage, message), which speaks against the jobs where a `place` is named that was found fit.

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
            body = self._message(lease.job_id, sealed_json, priority)
            args += [lease.job_id, lease.token, new_token(), body, host_fault, place]
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
        """Give the job its message, unless it was claimed by another meanwhile: behind those that wait, or before them
        where its worker has now died twice."""
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
            json.loads(sealed_json or "")
            whole = message(job_id, sealed_json, priority)
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


def _claimed(
    job: QueuedJob,
    token: str,
    sealed_json: str,
    facts: list[str],
    canvas_json: str | None = None,
    is_alone: bool = False,
) -> Claimed:
    attempt, max_attempts, claimed_at, submitted_at, deadline_at, max_visual_tokens, *earlier = facts
    unreachable_since, num_unreachable, host_faults, waits = earlier
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
        host_faults=json.loads(host_faults or "{}"),
        is_alone=is_alone,
        waits=bool(waits),
        idempotency_key=job.idempotency_key,
        result_ttl_seconds=job.result_ttl_seconds,
        sealed_json=sealed_json,
        canvas_json=canvas_json,
        delivery_tag=job.delivery_tag,
    )
