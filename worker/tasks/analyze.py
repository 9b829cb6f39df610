"""The Celery task, and the analyst behind it: open, claim, attempt, settle. The attempt itself lives next door.

Jobs of a process run side by side: of those whose worker died once few, and one that may have killed it alone.
"""

import json
import logging
import random
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from celery import Celery, Task, shared_task
from celery.exceptions import Ignore, Reject
from celery.utils.collections import LimitedSet
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from keye.config.codes import ErrorCode, Stage
from keye.config.connection import ArgumentTooLarge, check_arguments, passes
from keye.config.faults import Fault, InvalidJob, JobFailed, UnknownSchemaVersion
from keye.config.outcome import JobFailure, JobResult
from keye.config.topology import ANALYZE_TASK, RECORDED
from keye.config.wire import Outline, SealedJob, kind_of, open_sealed, read_sealed, traceparent_of
from keye.worker.broker.canvas import NOTHING_ASKED, Asked, Canvas
from keye.worker.broker.transport import IS_ACKNOWLEDGED
from keye.worker.host_fault import HostFault, host_fault_of
from keye.worker.leases.claims import AlreadySettled, Claimed, Forgotten, HeldElsewhere, QueuedJob, Suspect
from keye.worker.leases.job_lease import LeaseStore, Postponement
from keye.worker.leases.renewal import LeaseRenewal
from keye.worker.results.outbox import Outbox
from keye.worker.results.settlement import Settlement
from keye.worker.tasks.attempt import Attempt, Drained, LeaseLost
from keye.worker.tasks.fault import (
    ANOTHERS_ID,
    CANCELLED_BEFORE,
    CANCELLED_WHILE_RUNNING,
    explain,
    failure_of,
    fault_met,
)
from keye.worker.tasks.fitness import Fitness
from keye.worker.tasks.isolation import Isolation
from keye.worker.tasks.moves import log_claim, log_given_back, log_retry
from keye.worker.tasks.retry_policy import RetryDecision, decide_retry, is_to_blame, tell_tries, window_of
from keye.worker.tasks.stragglers import Stragglers
from keye.worker.tasks.work_clock import WorkClock
from keye.worker.tasks.workbench import Workbench
from keye.worker.telemetry import metrics, tell_warnings
from keye.worker.telemetry.log import about

log = logging.getLogger(__name__)

# Of tasks that were revoked before their job was known here.
MAX_REVOKED = 10_000


@dataclass(frozen=True, slots=True)
class Answer:
    """How the job of a delivery ended; `canvas` is what Celery is to call for it, and nobody has yet.

    `is_acknowledged` where the message is acknowledged already, in one move with the outcome.
    """

    job_id: str
    outcome: JobResult | JobFailure
    canvas: Canvas | None
    is_acknowledged: bool


# Ignored by Celery: settling has written its result.
@shared_task(
    name=ANALYZE_TASK,
    bind=True,
    acks_late=True,
    ignore_result=True,
    throws=(JobFailed,),
    Request="keye.worker.tasks.quiet_consumer:JobRequest",
    # What a message may say is known to the door, not to this signature; a job may follow another in a canvas.
    typing=False,
)
def analyze(delivery: Task, sealed: Any = None, written: str | None = None) -> None:
    """One delivery. Its Celery result is the outcome's JSON, or `JobFailed` for a job that failed.

    The arguments are what `keye.worker.broker.admission` made of the message; `written` is JSON of what else
    it may ask.
    """
    analyst: Analyst = delivery.app.analyst
    if not analyst.fitness.takes_jobs:
        raise Reject("this worker takes no jobs now", requeue=True)
    asked = NOTHING_ASKED
    if written is not None:
        arguments = json.loads(written)
        sealed, asked = arguments["sealed"], Asked.model_validate(arguments["asked"])
    # Of kombu's message, whose QoS asks for it.
    properties = delivery.request.properties or {}
    try:
        tag, is_recorded = properties.get("delivery_tag", ""), bool(delivery.request.get(RECORDED))
        answer = analyst.analyze(sealed, delivery.request.id, asked, tag, is_recorded)
        if answer is not None:
            if answer.is_acknowledged:
                properties[IS_ACKNOWLEDGED] = True
            analyst.call_what_follows(delivery.app, delivery.request.id, answer)
    except RedisError as fault:
        if not passes(fault):
            raise
        raise Reject(f"Redis stayed away: {fault}", requeue=True) from None
    if answer is None:
        # Acknowledged without a result: the job's one result is another delivery's to write.
        raise Ignore
    if isinstance(answer.outcome, JobFailure):
        raise JobFailed.of(answer.outcome)


class Analyst:
    """Answers deliveries, any number of threads at once. Whatever happens under a job becomes that job's outcome."""

    def __init__(
        self,
        bench: Workbench,
        leases: LeaseStore,
        renewal: LeaseRenewal,
        settlement: Settlement,
        outbox: Outbox,
        work: WorkClock,
        fitness: Fitness,
    ) -> None:
        self._bench = bench
        self._leases = leases
        self._renewal = renewal
        self._settlement = settlement
        self._outbox = outbox
        self._work = work
        self.fitness = fitness
        # Of all processes that were started one after another under this name.
        self._place = f"{bench.worker.host}:{metrics.WORKER or bench.worker.pid}"
        self._isolation = Isolation()
        self._revoked = LimitedSet(maxlen=MAX_REVOKED)
        # Of deliveries that are being answered and whose task has another id than their job.
        self._jobs: dict[str, str] = {}
        self.stragglers = Stragglers(settlement, bench.lookahead)

    def analyze(
        self,
        payload: Any,
        delivery_id: str,
        asked: Asked = NOTHING_ASKED,
        delivery_tag: str = "",
        is_recorded: bool = False,
    ) -> Answer | None:
        """The job's outcome, written by this delivery or found written; None where another attempt has it or is due.

        `is_recorded` as the message says (`keye.config.topology.RECORDED`). Raises Redis' own fault where it stayed
        away for longer than patience lasts.
        """
        tell_warnings()
        queued, opened = self._identify(payload, delivery_id, asked)
        queued = replace(queued, is_recorded=is_recorded)
        try:
            check_arguments(self._leases.redis, queued.record.values())
        except ArgumentTooLarge as fault:
            queued = QueuedJob.unreadable(Outline(), queued.job_id, "null")
            opened = Fault(ErrorCode.INVALID_JOB, f"The job cannot be stored: it has {fault}.")
        if queued.is_newer:
            left_seconds = self._leases.leave(queued, self._bench.newer_job_seconds)
            if left_seconds is not None:
                level = logging.DEBUG if left_seconds else logging.INFO
                log.log(level, "job %s: of a newer release, left to workers that know it", queued.job_id)
                return None
        if queued.job_id == delivery_id:
            # A task of another id is told after its job has ended, and its message stays until then.
            queued = replace(queued, delivery_tag=delivery_tag)
        self._jobs[delivery_id] = queued.job_id
        try:
            with about(job_id=queued.job_id), self._isolation.beside_others():
                answer = self._leases.claim(queued, self._bench.worker.name, in_company=True)
                if not isinstance(answer, Suspect):
                    return self._act_on(answer, queued, opened, delivery_id)
            # Not claimed while it waits: should another suspect kill this process too, that is no attempt of this one.
            log.warning("job %s: its workers died or met faults of their hosts, it waits to run alone", queued.job_id)
            with about(job_id=queued.job_id), self._isolation.alone(queued.job_id) as is_first:
                if not is_first:
                    return None
                answer = self._leases.claim(queued, self._bench.worker.name, is_alone=True)
                return self._act_on(answer, queued, opened, delivery_id)
        finally:
            self._jobs.pop(delivery_id, None)

    def job_of(self, task_id: str) -> str:
        """The job that a Celery task is for: of the same id, as a rule."""
        return self._jobs.get(task_id, task_id)

    def revoke(self, task_id: str) -> None:
        """A task whose job nobody knows yet: it is cancelled when it comes to this process."""
        self._revoked.add(task_id)

    def call_what_follows(self, app: Celery, task_id: str, answer: Answer) -> None:
        """Once. Raises Redis' fault where it is away; what it refuses for good is told of in the log."""
        if answer.canvas is None:
            return
        try:
            answer.canvas.call(app, task_id, answer.outcome)
        except Exception as fault:
            # kombu wraps what it could not publish.
            cause = fault.__cause__ if isinstance(fault, OperationalError) else fault
            if isinstance(cause, RedisError) and passes(cause):
                raise cause from None
            log.exception("job %s: what follows it cannot be called", task_id)
        self._leases.canvas_is_called(answer.job_id)

    def _identify(self, payload: Any, delivery_id: str, asked: Asked) -> tuple[QueuedJob, SealedJob | Fault]:
        """Whose delivery it is, and what it says. A message that names another's job has nothing to do with that."""
        queued, opened = open_delivery(payload, delivery_id)
        if isinstance(opened, Fault) and not queued.is_newer and queued.job_id == delivery_id:
            # What counts is the record, which only others may know how to read.
            recorded, in_record = open_delivery(read_sealed(self._leases.sealed(delivery_id)), delivery_id)
            if recorded.job_id == delivery_id and (recorded.is_newer or isinstance(in_record, SealedJob)):
                return recorded, in_record
        # One that came with a job would end another's of the same content.
        if asked.refused is not None and payload is None:
            opened = Fault(ErrorCode.INVALID_JOB, asked.refused)
        if asked is not NOTHING_ASKED:
            queued = replace(queued, record=asked.written_into(queued.record))
        is_its_own = queued.job_id == delivery_id
        if is_its_own and not queued.is_newer:
            return queued, opened
        stored = self._leases.sealed(queued.job_id)
        is_same = stored is None or _is_same(stored, payload, opened)
        if is_its_own:
            return replace(queued, is_newer=is_same), opened
        if is_same and self._leases.sealed(delivery_id) is None:
            return queued, opened
        unreadable = QueuedJob.unreadable(Outline.of(payload), delivery_id, json.dumps(payload))
        return unreadable, Fault(ErrorCode.INVALID_JOB, ANOTHERS_ID)

    def _act_on(
        self,
        answer: Claimed | AlreadySettled | HeldElsewhere | Forgotten | Suspect,
        queued: QueuedJob,
        opened: SealedJob | Fault,
        delivery_id: str,
    ) -> Answer | None:
        is_acknowledged = False
        match answer:
            case Claimed():
                # What counts is the record, which the message may contradict.
                if answer.sealed_json != queued.record["sealed"]:
                    recorded, opened = open_delivery(read_sealed(answer.sealed_json), answer.job_id)
                    if isinstance(opened, SealedJob) and opened.job_id != answer.job_id:
                        opened = Fault(ErrorCode.INVALID_JOB, ANOTHERS_ID)
                    if recorded.is_newer and not queued.is_newer:
                        # Comes again with what the record says, and is left to others then.
                        self._leases.requeue([answer])
                        return None
                    key = recorded.idempotency_key or answer.idempotency_key
                    answer = replace(answer, idempotency_key=key, result_ttl_seconds=recorded.result_ttl_seconds)
                in_record = answer.sealed_json
                traceparent = opened.job.traceparent if isinstance(opened, SealedJob) else traceparent_of(in_record)
                if delivery_id in self._revoked:
                    opened = Fault(ErrorCode.CANCELLED, CANCELLED_BEFORE)
                with about(job_id=answer.job_id, attempt=answer.attempt, traceparent=traceparent):
                    log_claim(answer)
                    outcome = self._run(opened, answer)
                is_told = answer.job_id == delivery_id
                is_acknowledged = bool(answer.delivery_tag) and answer.canvas_json is None
            case AlreadySettled(outcome):
                is_told = False
            case Forgotten():
                log.warning("job %s: not run, its message outlived its record: it has ended long ago", queued.job_id)
                return None
            case _:
                return None
        if outcome is None:
            return None
        if not is_told:
            self._leases.patience.wait_out(
                lambda: self._settlement.tell_celery(delivery_id, outcome, queued.result_ttl_seconds),
                f"telling Celery of task {delivery_id}",
            )
        canvas = None if answer.canvas_json is None else Canvas.model_validate_json(answer.canvas_json)
        return Answer(queued.job_id, outcome, canvas, is_acknowledged)

    def _run(self, opened: SealedJob | Fault, lease: Claimed) -> JobResult | JobFailure | None:
        if isinstance(opened, Fault):
            return self._settle(lease, failure_of(opened, Stage.OPEN, lease, metadata={}))
        attempt = Attempt(self._bench, opened.job, lease)
        with self._renewal.holding(lease, attempt.interrupt), ExitStack() as place:
            outcome: JobResult | JobFailure
            try:
                with self._bench.lookahead.watching(attempt):
                    # Until it is settled: until then a death counts.
                    place.enter_context(attempt.in_company(self._isolation))
                    with self._work.running(kind_of(opened.job)):
                        outcome = attempt.run()
                self.fitness.answered()
            except LeaseLost:
                log.warning("job %s: lease lost in stage %s, left to its new holder", lease.job_id, attempt.stage)
                return None
            except Drained:
                log_given_back(lease, attempt.stage)
                return None
            except BaseException as error:
                if (host_fault := host_fault_of(error)) is not None:
                    return self._give_back(attempt, host_fault)
                # SystemExit and KeyboardInterrupt too: let out, they would take this slot of the pool with them.
                fault = explain(error)
                if fault.code is ErrorCode.INTERNAL:
                    log.exception("job %s: a fault of the worker in stage %s", lease.job_id, attempt.stage)
                outcome = failure_of(fault, attempt.stage, lease, opened.job.metadata)
                seconds, window = attempt.seconds, window_of(opened.job, lease, self._bench.media_retry_seconds)
                again = decide_retry(fault, lease, attempt.num_visual_tokens, seconds, window, random.random())
                if again is not None:
                    attempt.events.flush()
                    return self._retry(lease, outcome, again)
                if fault.code is ErrorCode.MEDIA_UNREACHABLE and lease.num_unreachable:
                    told = f"{outcome.message} {tell_tries(lease, seconds, window)}"
                    outcome = outcome.model_copy(update={"message": told})
            try:
                return self._settle(lease, outcome, attempt.events.unwritten)
            except RedisError:
                raise
            except BaseException as error:
                log.exception("job %s: its outcome cannot be written", lease.job_id)
                return self._settle(lease, failure_of(explain(error), attempt.stage, lease, opened.job.metadata))

    def _give_back(self, attempt: Attempt, host_fault: HostFault) -> JobResult | JobFailure | None:
        """For another worker, and not counted; unless the fault is the job's own by now."""
        lease, stage = attempt.lease, attempt.stage
        log.warning("job %s: met a fault of this host in stage %s: %s", lease.job_id, stage, host_fault)
        is_fit = self.fitness.suffered(host_fault, lease.job_id)
        is_suspected = attempt.is_in_engine if host_fault.is_final else is_fit
        failure = failure_of(fault_met(host_fault, lease, self._place), stage, lease, attempt.job.metadata)
        if is_suspected and is_to_blame(lease, self._place):
            return self._settle(lease, failure, attempt.events.unwritten)
        attempt.events.flush()
        told = json.dumps({"stage": stage, "message": f"A fault of the worker's host: {host_fault.kind}."})
        place = self._place if is_suspected else ""
        answer = self._leases.patience.wait_out(
            lambda: self._leases.requeue([lease], told, place)[0], f"giving job {lease.job_id} back"
        )
        if answer == "queued":
            log_given_back(lease, stage, "for another worker")
        return self._unless_queued(answer, lease, failure)

    def _retry(self, lease: Claimed, failure: JobFailure, again: RetryDecision) -> JobResult | JobFailure | None:
        answer = self._leases.patience.wait_out(
            lambda: self._leases.retry(lease, failure, again.pause_seconds, again.max_visual_tokens, again.counts),
            f"queueing job {lease.job_id} again",
        )
        if answer == "queued":
            metrics.RETRIES.labels(failure.code).inc()
            log_retry(lease, failure, again.pause_seconds)
        return self._unless_queued(answer, lease, failure)

    def _unless_queued(
        self, answer: Postponement, lease: Claimed, failure: JobFailure
    ) -> JobResult | JobFailure | None:
        match answer:
            case "queued":
                return None
            case "cancelled":
                cancelled = {"code": ErrorCode.CANCELLED, "message": CANCELLED_WHILE_RUNNING, "retryable": False}
                return self._settle(lease, failure.model_copy(update=cancelled))
            case _:
                log.warning("job %s: lease lost before it could be queued again", lease.job_id)
                return None

    def _settle(
        self, lease: Claimed, outcome: JobResult | JobFailure, last_events: Sequence[str] = ()
    ) -> JobResult | JobFailure | None:
        if not self._outbox.settle(lease, outcome, last_events):
            log.warning("job %s: lease lost before settling, outcome discarded", lease.job_id)
            return None
        return outcome


def open_delivery(payload: Any, delivery_id: str) -> tuple[QueuedJob, SealedJob | Fault]:
    """What the message holds; one that cannot be read still names its job, by its own id where it has no other."""
    is_newer = False
    try:
        sealed = open_sealed(payload)
    except UnknownSchemaVersion as error:
        fault, is_newer = Fault(ErrorCode.UNKNOWN_SCHEMA_VERSION, str(error)), error.is_newer
    except InvalidJob as error:
        fault = Fault(ErrorCode.INVALID_JOB, str(error))
    else:
        return QueuedJob.of(sealed), sealed
    outline = Outline.of(payload)
    return QueuedJob.unreadable(outline, outline.job_id or delivery_id, json.dumps(payload), is_newer), fault


def _is_same(stored: str, payload: Any, opened: SealedJob | Fault) -> bool:
    """Whether a record asks for the same as a message; both may be of a newer release."""
    try:
        recorded = json.loads(stored)
        return bool(recorded == payload or (isinstance(opened, SealedJob) and open_sealed(recorded) == opened))
    except ValueError:
        return False
