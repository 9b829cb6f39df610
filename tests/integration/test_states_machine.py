"""Random lives of jobs against a real server: whatever is done in whatever order, the promises about a job hold.

Every move is the project's own; only time is faked, by making what is due later due now.
"""

import json
import time
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)
from pydantic import SecretStr

from keye.config import keys
from keye.config.codes import LEGAL_MOVES, ErrorCode, JobState, Stage
from keye.config.connection import connect
from keye.config.event import EVENT, JobEnded
from keye.config.faults import DeadLetterNotFound
from keye.config.job import AnalysisJob, Priority
from keye.config.outcome import FailedAttempt, JobFailure
from keye.config.settings import Settings
from keye.config.topology import message_list
from keye.config.wire import SealedJob, seal
from keye.producer import Client, Job
from keye.producer.transport import Transport
from keye.producer.verify import judge, read_ledger
from keye.worker.leases.claims import (
    AlreadySettled,
    Claimed,
    HeldElsewhere,
    QueuedJob,
    Suspect,
)
from keye.worker.leases.job_lease import LeaseStore
from keye.worker.leases.reaper import Reaper
from keye.worker.results.event_writer import EventWriter
from keye.worker.results.outbox import Outbox, Spool, Verdict
from keye.worker.results.settlement import Settlement
from keye.worker.tasks.stragglers import dead_letter, expire
from tests.support.scale import SCALE, SHORT

LEASE_SECONDS = 30


class Jobs(RuleBasedStateMachine):
    """`seen` is what was last read of each job, `claims` counts what was granted of it, `settlers` has who ended it.

    `given_back` are the attempts that ended with a drain, `waiting` those that wait for their turn.
    """

    jobs: Bundle[Job] = Bundle("jobs")
    leases: Bundle[Claimed] = Bundle("leases")
    url: str
    folder: Path

    @initialize()
    def connect(self) -> None:
        options = Settings(redis_url=SecretStr(self.url), lease_seconds=LEASE_SECONDS)
        self.redis = connect(self.url)
        self.redis.flushall()
        self.client = Client(options)
        self.transport = Transport(options)
        self.store = LeaseStore(self.redis, LEASE_SECONDS)
        self.settlement = Settlement(self.redis, 3600, 9000)
        self.spool = Spool(Path(mkdtemp(dir=self.folder)))
        self.outbox = Outbox(self.settlement, self.spool, self.store.patience)
        self.reaper = Reaper(
            self.store, "reaper", (), partial(dead_letter, self.settlement), partial(expire, self.settlement)
        )
        self.seen: dict[str, dict[str, str]] = {}
        self.claims: dict[str, int] = {}
        self.settlers: dict[str, Claimed] = {}
        self.given_back: set[tuple[str, int]] = set()
        self.waiting: set[tuple[str, int]] = set()

    # Few jobs with much happening to each.
    @precondition(lambda self: len(self.claims) < 3)
    @rule(
        target=jobs,
        max_attempts=st.integers(1, 3),
        priority=st.sampled_from(Priority),
        deadline=st.sampled_from([None, 600.0]),
        is_published=st.booleans(),
    )
    def submit(self, max_attempts: int, priority: Priority, deadline: float | None, is_published: bool) -> Job:
        asked = AnalysisJob(prompt="?", max_attempts=max_attempts, priority=priority, deadline_seconds=deadline)
        if is_published:
            job = self.client.submit(asked)
        else:
            # A producer in another language, which dies before it sends the message.
            sealed = seal(asked)
            self.redis.hset(keys.record(sealed.job_id), mapping=sealed.record)
            self.redis.zadd(keys.LEASES, {sealed.job_id: time.time() + LEASE_SECONDS})
            if deadline:
                self.redis.zadd(keys.DEADLINES, {sealed.job_id: sealed.submitted_at + deadline})
            job = self.client.find(sealed.job_id)
        self.claims[job.id] = 0
        return job

    @rule(target=leases, job=jobs)
    def deliver(self, job: Job) -> Any:
        """A message arrives: the first, a second, or one long after the end."""
        claimed = self.claim(job)
        return multiple() if claimed is None else claimed

    @rule(job=jobs)
    def leave(self, job: Job) -> None:
        """A message arrives at a worker that does not know the job's schema version."""
        before = self.record(job.id)
        sealed = SealedJob.model_validate_json(before["sealed"])
        left_seconds = self.store.leave(QueuedJob.of(sealed), patience_seconds=600)
        assert (left_seconds is not None) == (before["state"] == JobState.QUEUED)

    def claim(self, job: Job) -> Claimed | None:
        before = self.record(job.id)
        sealed = SealedJob.model_validate_json(before["sealed"])
        answer = self.store.claim(QueuedJob.of(sealed), "worker")
        if isinstance(answer, Suspect):
            assert int(before["deaths"]) > 0
            answer = self.store.claim(QueuedJob.of(sealed), "worker", is_alone=True)
        match answer:
            case Claimed():
                assert before["state"] == JobState.QUEUED
                self.claims[job.id] += 1
                assert answer.attempt == self.claims[job.id], "attempts are neither lost nor made up"
                return answer
            case AlreadySettled(outcome):
                assert outcome.model_dump_json() == before["outcome"]
            case HeldElsewhere():
                assert before["state"] == JobState.RUNNING or float(before["due_at"]) > time.time()
        return None

    def holds(self, lease: Claimed) -> bool:
        record = self.record(lease.job_id)
        return record["state"] == JobState.RUNNING and record["token"] == lease.token

    @rule(lease=leases)
    def renew(self, lease: Claimed) -> None:
        is_holder = self.holds(lease)
        assert (self.store.renew([lease]) == ["lost"]) == (not is_holder)

    @rule(lease=leases, waits=st.booleans())
    def wait_for_its_turn(self, lease: Claimed, waits: bool) -> None:
        before, is_holder = self.record(lease.job_id), self.holds(lease)
        EventWriter(self.redis).write_waits(lease, waits)
        if not is_holder:
            assert self.record(lease.job_id) == before, "who lost the lease writes nothing"
        elif waits:
            self.waiting.add((lease.job_id, lease.attempt))
        else:
            self.waiting.discard((lease.job_id, lease.attempt))

    @rule(lease=leases)
    def die(self, lease: Claimed) -> None:
        """Its death is the job's where it did not wait."""
        if not self.holds(lease):
            return
        before = self.record(lease.job_id)
        self.time_passes_over_a_lease_or_a_pause(Job(lease.job_id, self.transport))
        self.reaper.look_around()
        waited = (lease.job_id, lease.attempt) in self.waiting and "cancel_requested" not in before
        is_spared = waited and int(before.get("spared", 0)) < 10
        after = self.record(lease.job_id)
        for field, is_counted in (("spared", is_spared), ("deaths", not is_spared)):
            assert int(after.get(field, 0)) == int(before.get(field, 0)) + is_counted
        assert int(after["max_attempts"]) == int(before["max_attempts"]) + is_spared

    @rule(lease=leases, code=st.sampled_from([ErrorCode.INTERNAL, ErrorCode.CANCELLED, ErrorCode.DEADLINE_EXCEEDED]))
    def settle(self, lease: Claimed, code: ErrorCode) -> None:
        before, is_holder = self.record(lease.job_id), self.holds(lease)
        is_settled = self.settlement.settle(lease, failure(lease, code))
        if is_holder:
            self.settlers[lease.job_id] = lease
        else:
            assert self.record(lease.job_id) == before, "who lost the lease writes nothing"
        assert is_settled == (self.settlers.get(lease.job_id) == lease), "and is told so"

    @rule(lease=leases)
    def die_with_an_outcome_on_disk(self, lease: Claimed) -> None:
        """Redis took nothing while its worker lived."""
        self.spool.keep(Verdict(lease=lease, outcome=failure(lease, ErrorCode.INTERNAL)))

    @rule()
    def outcomes_on_disk_are_delivered(self) -> None:
        """The next worker of that host, perhaps long after."""
        holders = [verdict.lease for verdict in self.spool.waiting() if self.holds(verdict.lease)]
        self.outbox.deliver()
        assert not list(self.spool.waiting())
        self.settlers |= {lease.job_id: lease for lease in holders}

    @rule(lease=leases, pause=st.sampled_from([0.0, 60.0]))
    def fail_for_now(self, lease: Claimed, pause: float) -> None:
        if lease.attempt >= int(self.record(lease.job_id)["max_attempts"]):
            return
        is_holder = self.holds(lease)
        answer = self.store.retry(lease, failure(lease, ErrorCode.MEDIA_UNREACHABLE), pause, None)
        assert (answer == "lost") == (not is_holder)

    @rule(lease=leases)
    def give_back(self, lease: Claimed) -> None:
        is_holder = self.holds(lease)
        (answer,) = self.store.requeue([lease])
        assert (answer == "lost") == (not is_holder)
        if answer == "queued":
            self.given_back.add((lease.job_id, lease.attempt))

    @rule(job=jobs)
    def cancel(self, job: Job) -> None:
        before = self.record(job.id)["state"]
        job.cancel()
        assert self.record(job.id)["state"] == (JobState.CANCELLED if before == JobState.QUEUED else before)

    @rule(job=jobs)
    def requeue(self, job: Job) -> None:
        try:
            letter = self.client.dead_letters.find(job.id)
        except DeadLetterNotFound:
            return
        again = self.client.dead_letters.requeue(letter)
        assert again.id not in self.claims
        self.claims[again.id] = 0

    @rule(job=jobs)
    def time_passes_over_a_lease_or_a_pause(self, job: Job) -> None:
        self.redis.zadd(keys.LEASES, {job.id: time.time() - 1}, xx=True)
        if "due_at" in self.record(job.id):
            self.redis.hset(keys.record(job.id), "due_at", time.time() - 1)

    @rule(job=jobs)
    def time_passes_over_a_deadline(self, job: Job) -> None:
        if self.record(job.id)["deadline_at"]:
            self.redis.hset(keys.record(job.id), "deadline_at", time.time() - 1)
            self.redis.zadd(keys.DEADLINES, {job.id: time.time() - 1}, xx=True)

    @rule(lease=leases)
    def a_worker_freezes_and_comes_back_late(self, lease: Claimed) -> None:
        self.time_passes_over_a_lease_or_a_pause(Job(lease.job_id, self.transport))
        self.reaper.look_around()
        self.settle(lease, ErrorCode.INTERNAL)

    @rule(priority=st.sampled_from(Priority))
    def messages_get_lost(self, priority: Priority) -> None:
        self.redis.delete(message_list(priority))

    @rule()
    def reap(self) -> None:
        self.reaper.look_around()

    @invariant()
    def promises_hold(self) -> None:
        for job_id in self.claims:
            record, before = self.record(job_id), self.seen.get(job_id)
            state = JobState(record["state"])
            if before is not None:
                assert "outcome" not in before or record["outcome"] == before["outcome"], "one outcome"
                assert can_come_of(JobState(before["state"]), state)
            ends = [event for event in self.events(job_id) if isinstance(event, JobEnded)]
            assert [event.state for event in ends] == ([state] if state.is_final else [])
            attempts = int(record["attempts"])
            assert attempts == self.claims[job_id] <= int(record["max_attempts"])
            told = attempts - 1 if state in (JobState.RUNNING, JobState.SUCCEEDED) else attempts
            for number in range(1, told + 1):
                if (job_id, number) in self.given_back:
                    continue
                assert FailedAttempt.model_validate_json(record[f"attempt:{number}"]).attempt == number
            self.seen[job_id] = record
        assert not list(judge(read_ledger(self.redis), LEASE_SECONDS))

    def teardown(self) -> None:
        """From wherever it was left, every job comes to an end, and then to be forgotten, by messages alone."""
        for _ in range(12):
            waiting = [job_id for job_id in self.claims if self.redis.ttl(keys.record(job_id)) == -1]
            if not waiting:
                break
            for job_id in waiting:
                self.time_passes_over_a_lease_or_a_pause(Job(job_id, self.transport))
            for listed in (*map(keys.queued, Priority), *map(keys.unheard, Priority)):
                for job_id in self.redis.zrange(listed, 0, -1):
                    self.redis.zincrby(listed, -3 * LEASE_SECONDS, job_id)
            self.reaper.look_around()
            for message in self.take_messages():
                lease = self.claim(Job(message["headers"]["id"], self.transport))
                if lease is not None:
                    assert self.settlement.settle(lease, failure(lease, ErrorCode.INTERNAL))
        else:
            raise AssertionError(f"no way out for {[self.record(job_id) for job_id in waiting]}")
        self.promises_hold()
        self.client.close()
        self.transport.redis.close()
        self.redis.close()

    def take_messages(self) -> list[dict[str, Any]]:
        taken = []
        for priority in Priority:
            while raw := self.redis.rpop(message_list(priority)):
                taken.append(json.loads(raw))
        return taken

    def record(self, job_id: str) -> dict[str, str]:
        return self.redis.hgetall(keys.record(job_id))

    def events(self, job_id: str) -> list[object]:
        return [EVENT.validate_json(fields["event"]) for _, fields in self.redis.xrange(keys.events(job_id))]


def can_come_of(before: JobState, after: JobState) -> bool:
    """By legal moves; one rule may make several."""
    reached = {before}
    while True:
        further = reached | {state for one in reached for state in LEGAL_MOVES[one]}
        if further == reached:
            return after in reached
        reached = further


def failure(lease: Claimed, code: ErrorCode) -> JobFailure:
    return JobFailure(
        job_id=lease.job_id, code=code, message="no", stage=Stage.DECODE, retryable=False, attempts=lease.attempt
    )


def test_no_order_of_events_breaks_a_promise(redis_url: str, tmp_path: Path) -> None:
    class JobsOfThisServer(Jobs):
        url = redis_url
        folder = tmp_path

    run_state_machine_as_test(
        JobsOfThisServer,
        settings=settings(
            max_examples=SCALE.num_histories,
            stateful_step_count=40,
            deadline=None,
            derandomize=SCALE is SHORT,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )
