"""Content belongs to the id: nobody reads, replaces, changes or holds up a job of somebody else by a message of his."""

import json
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import pytest

from keye.config import keys
from keye.config.codes import ErrorCode, JobState
from keye.config.job import Priority
from keye.config.topology import QUEUE, message_list
from keye.producer import Job
from tests.integration.hostile.echo_host import EchoHost
from tests.integration.hostile.errands import ALLOWED, REPORT
from tests.integration.hostile.messages import NAN, as_body, message, sealed_job
from tests.support.conditions import eventually

SETTINGS = {"KEYE_CELERY_CANVAS": ALLOWED}
CONFIDENTIAL = "what tenant A wants to know"
LIES = "lies in the name of tenant A"
LONG_AGO, FAR_AWAY = "2001-01-01T00:00:00+00:00", "2036-01-01T00:00:00+00:00"


def settled(host: EchoHost) -> Job:
    job = host.client.submit(prompt=CONFIDENTIAL)
    job.result(timeout=60)
    return job


def payload_of(host: EchoHost, job: Job) -> Any:
    """The sealed job as its record has it: an attacker may have seen it."""
    return json.loads(host.redis.hget(keys.record(job.id), "sealed"))


def assert_unharmed(host: EchoHost, job: Job) -> None:
    result = job.result(timeout=60)
    assert (result.answer, result.attempts) == (CONFIDENTIAL, 1)
    assert host.celery_result(job.id)["result"]["answer"] == CONFIDENTIAL
    host.answer_another()
    assert LIES not in everything(host, job.id)
    assert host.foreign_keys() == []
    assert host.client.verify()[1] == []


def everything(host: EchoHost, job_id: str) -> str:
    """All that Redis holds of a job."""
    record, events = host.redis.hgetall(keys.record(job_id)), host.redis.xrange(keys.events(job_id))
    return json.dumps([record, events, host.redis.get(f"celery-task-meta-{job_id}")])


@pytest.mark.holds(
    "docs/reliability.md#promises",
    "A message under another id",
)
def test_the_answer_of_an_ended_job_is_not_read_by_its_id(host: EchoHost) -> None:
    victim, thief = settled(host), str(uuid4())
    host.send(message(thief, sealed=sealed_job(victim.id, prompt=LIES)))
    failure = host.failure(thief)
    assert failure.code is ErrorCode.INVALID_JOB
    assert "that of another job" in failure.message
    assert CONFIDENTIAL not in everything(host, thief)
    assert host.celery_result(thief)["status"] == "FAILURE"
    assert_unharmed(host, victim)


def test_nor_the_answer_of_one_that_runs(host: EchoHost) -> None:
    victim, thief = host.client.submit(prompt="wait 2"), str(uuid4())
    eventually(lambda: victim.state is JobState.RUNNING)
    host.send(message(thief, sealed=sealed_job(victim.id, prompt=LIES)))
    assert host.failure(thief).code is ErrorCode.INVALID_JOB
    assert victim.state is JobState.RUNNING
    result = victim.result(timeout=60)
    assert (result.answer, result.attempts) == ("wait 2", 1)
    assert "wait 2" not in everything(host, thief)


@pytest.mark.holds(
    "docs/reliability.md#promises",
    "A message under another id",
)
def test_whoever_knows_all_of_a_job_hears_how_it_ended(host: EchoHost) -> None:
    """A Celery client gives tasks ids of its own; it has sealed the job, or knows what is in it."""
    job, delivery = settled(host), str(uuid4())
    host.send(message(delivery, sealed=payload_of(host, job)))
    assert host.celery_result(delivery)["result"]["answer"] == CONFIDENTIAL
    assert_unharmed(host, job)


@pytest.mark.parametrize("others", ["unknown", "of another job"])
def test_celerys_result_of_an_ended_job_is_not_overwritten(host: EchoHost, others: str) -> None:
    victim = settled(host)
    other_id = str(uuid4()) if others == "unknown" else settled(host).id
    host.send(message(victim.id, sealed=sealed_job(other_id, prompt=LIES)))
    host.answer_another()
    assert_unharmed(host, victim)
    assert LIES not in everything(host, other_id)


def test_nor_of_one_that_runs(host: EchoHost) -> None:
    victim = host.client.submit(prompt="wait 2")
    eventually(lambda: victim.state is JobState.RUNNING)
    for payload in (sealed_job(victim.id, prompt=LIES), sealed_job(str(uuid4()), prompt=LIES), LIES, None):
        host.send(message(victim.id, sealed=payload))
    assert host.client.submit(prompt="said behind it").result(timeout=60).answer
    assert victim.state is JobState.RUNNING
    result = victim.result(timeout=60)
    assert (result.answer, result.attempts) == ("wait 2", 1)
    host.answer_another()
    assert host.celery_result(victim.id)["result"]["answer"] == "wait 2"


# What a message says that lies before a waiting job's own, under its id.
HIJACKS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "another prompt": lambda payload: {"sealed": sealed_job(payload["job_id"], prompt=LIES)},
    "another prompt by hand": lambda payload: {"kwargs": {"job": {"prompt": LIES}}},
    "another id inside": lambda payload: {"sealed": sealed_job(str(uuid4()), prompt=LIES)},
    "no job": lambda payload: {"sealed": LIES},
    "nothing": lambda payload: {"kwargs": {"sealed": None}},
    "an invalid job": lambda payload: {"sealed": {**payload, "job": {}}},
    "an unreadable message": lambda payload: {"changes": {"body": "%%%"}},
    "another schema version": lambda payload: {"sealed": {**payload, "schema_version": 99}},
    "another schema version and prompt": lambda payload: {
        "sealed": {**sealed_job(payload["job_id"], prompt=LIES), "schema_version": 99}
    },
    "a schema version of long ago": lambda payload: {"sealed": {**payload, "schema_version": 0}},
    "a single attempt, which has failed": lambda payload: {
        "sealed": sealed_job(payload["job_id"], prompt="raise ValueError", max_attempts=1)
    },
    "a deadline in the past": lambda payload: {"sealed": sealed_job(payload["job_id"], deadline_seconds=1)},
    "another priority": lambda payload: {"sealed": sealed_job(payload["job_id"], prompt=LIES, priority="low")},
    "eta": lambda payload: {"sealed": payload, "changes": {"headers.eta": FAR_AWAY}},
    "eta and another prompt": lambda payload: {
        "sealed": sealed_job(payload["job_id"], prompt=LIES),
        "changes": {"headers.eta": FAR_AWAY},
    },
    "expires": lambda payload: {"sealed": payload, "changes": {"headers.expires": LONG_AGO}},
    "expires and another prompt": lambda payload: {
        "sealed": sealed_job(payload["job_id"], prompt=LIES),
        "changes": {"headers.expires": LONG_AGO},
    },
    "a callback that is allowed": lambda payload: {"sealed": payload, "embedded": {"callbacks": [REPORT]}},
    "an errback that is allowed": lambda payload: {
        "sealed": {**payload, "job": {}},
        "embedded": {"errbacks": [REPORT]},
    },
    "a refusal": lambda payload: {
        "kwargs": {"written": json.dumps({"sealed": payload, "asked": {"refused": LIES}})},
    },
    "a refusal of nothing": lambda payload: {
        "kwargs": {"written": json.dumps({"sealed": None, "asked": {"refused": LIES}})},
    },
    "a wait": lambda payload: {
        "kwargs": {"written": json.dumps({"sealed": payload, "asked": {"not_before": 4e9, "expires_at": 1.0}})},
    },
}


@pytest.mark.parametrize("kind", HIJACKS)
def test_a_waiting_job_is_answered_as_its_caller_has_asked(host: EchoHost, kind: str) -> None:
    with host.frozen():
        victim = host.client.submit(prompt=CONFIDENTIAL)
        before = host.redis.hgetall(keys.record(victim.id))
        host.send(message(victim.id, **HIJACKS[kind](payload_of(host, victim))), QUEUE)
    assert_unharmed(host, victim)
    after = host.redis.hgetall(keys.record(victim.id))
    as_submitted = ("sealed", "priority", "submitted_at", "deadline_at", "max_attempts")
    assert {name: after[name] for name in as_submitted} == {name: before[name] for name in as_submitted}
    assert not after.keys() & {"due_at", "canvas", "left_seconds"}
    assert f"job {victim.id}: of a newer release" not in host.log


@pytest.mark.parametrize("kind", HIJACKS)
def test_an_ended_job_stays_as_it_ended(host: EchoHost, kind: str) -> None:
    victim = settled(host)
    before = host.redis.hgetall(keys.record(victim.id))
    host.send(message(victim.id, **HIJACKS[kind](payload_of(host, victim))))
    host.answer_another()
    assert_unharmed(host, victim)
    assert host.redis.hgetall(keys.record(victim.id)) == before


@pytest.mark.parametrize("kind", HIJACKS)
def test_a_message_of_another_id_changes_nothing_of_a_waiting_job(host: EchoHost, kind: str) -> None:
    with host.frozen():
        victim, thief = host.client.submit(prompt=CONFIDENTIAL), str(uuid4())
        host.send(message(thief, **HIJACKS[kind](payload_of(host, victim))), QUEUE)
    host.answer_another()
    result = victim.result(timeout=60)
    assert (result.answer, result.attempts) == (CONFIDENTIAL, 1)
    host.redis.delete("reports")
    after = host.redis.hgetall(keys.record(victim.id))
    assert not after.keys() & {"due_at", "canvas", "left_seconds"}
    assert host.client.verify()[1] == []


@pytest.mark.parametrize("version", [99, 10**30])
def test_a_job_of_a_newer_release_is_nobodys_way_to_hold_up_another(host: EchoHost, version: int) -> None:
    thief = str(uuid4())
    with host.frozen():
        victim = host.client.submit(prompt=CONFIDENTIAL)
        host.send(message(thief, sealed={**payload_of(host, victim), "schema_version": version}), QUEUE)
    assert host.failure(thief).code is ErrorCode.INVALID_JOB
    assert_unharmed(host, victim)


def test_what_comes_first_under_an_id_is_the_job(host: EchoHost) -> None:
    job_id = str(uuid4())
    host.send(message(job_id, sealed=sealed_job(job_id, prompt="the first")), QUEUE)
    # Of two that are taken together, either thread may claim the job.
    eventually(lambda: host.redis.exists(keys.record(job_id)))
    host.send(message(job_id, sealed=sealed_job(job_id, prompt="the second")))
    host.answer_another()
    assert host.job(job_id).result(timeout=60).answer == "the first"


@pytest.mark.parametrize(
    "job_id",
    ["x", "0", "-", "..", "a" * 128, "tenant-a:2026.11_26:7", "events", "a:events:b", "leases", "job:x", "keye:leases"],
)
def test_an_id_of_any_letters_that_are_allowed_is_a_job_of_its_own(host: EchoHost, job_id: str) -> None:
    victim = settled(host)
    host.send(message(job_id))
    assert host.job(job_id).result(timeout=60).answer == "asked by hand"
    assert_unharmed(host, victim)


@pytest.mark.parametrize("others", [":events", ":events:events", "\n", " ", "\0", ":events\n"])
def test_an_id_inside_that_would_name_another_key_is_refused(host: EchoHost, others: str) -> None:
    victim, thief = settled(host), str(uuid4())
    host.send(message(thief, sealed=sealed_job(victim.id + others, prompt=LIES)))
    assert host.failure(thief).code is ErrorCode.INVALID_JOB
    assert_unharmed(host, victim)


@pytest.mark.parametrize("job_id", ["x:events", "", "*", "\n", "a" * 129, "a" * 10**6, None, 7, ["x"], {}])
def test_an_id_inside_that_is_none_leaves_the_job_to_its_message(host: EchoHost, job_id: Any) -> None:
    delivery = str(uuid4())
    host.send(message(delivery, sealed=sealed_job(job_id)))
    assert host.failure(delivery).code is ErrorCode.INVALID_JOB
    host.answer_another()


@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf"), "\ud83d", "a\ud83d"])
@pytest.mark.parametrize("max_attempts", [1, 3])
def test_what_json_cannot_hold_is_a_fault_of_the_job(host: EchoHost, value: Any, max_attempts: int) -> None:
    job_id = str(uuid4())
    host.send(message(job_id, sealed=sealed_job(job_id, metadata={"a": value}, max_attempts=max_attempts)))
    failure = host.failure(job_id)
    assert (failure.code, failure.attempts) == (ErrorCode.INVALID_JOB, 1)
    host.answer_another()


# Of the fields that a worker reads of any job; some are all right, and a higher version is a newer release's.
FIELDS = [
    (field, value)
    for field in ("submitted_at", "schema_version", "deadline_seconds", "max_attempts", "priority", "idempotency_key")
    for value in (NAN, float("inf"), 10**400, "\ud83d", "soon", [], -1)
    if (field, value) not in [("submitted_at", -1), ("idempotency_key", "soon"), ("schema_version", 10**400)]
]


@pytest.mark.parametrize(("field", "value"), FIELDS, ids=lambda each: f"{each!r}"[:12])
def test_a_field_of_another_kind_is_a_fault_of_the_job(host: EchoHost, field: str, value: Any) -> None:
    job_id = str(uuid4())
    sealed = sealed_job(job_id)
    (sealed if field in sealed else sealed["job"])[field] = value
    host.send(message(job_id, sealed=sealed))
    assert host.failure(job_id).code in (ErrorCode.INVALID_JOB, ErrorCode.UNKNOWN_SCHEMA_VERSION)
    host.answer_another()
    assert host.client.verify()[1] == []


@pytest.mark.holds(
    "docs/design.md#decisions",
    "`eta`, `expires` and what is to be called afterwards go into the job's record",
)
def test_an_eta_holds_up_its_own_job_and_no_hands(host: EchoHost) -> None:
    job_ids = [str(uuid4()) for _ in range(300)]
    for job_id in job_ids:
        host.send(message(job_id, {"headers.eta": FAR_AWAY}))
    host.answer_another()
    assert {host.client.find(job_id).state for job_id in job_ids} == {JobState.QUEUED}
    for job_id in job_ids:
        host.client.find(job_id).cancel()
    assert host.client.verify()[1] == []


def test_jobs_that_expired_end_at_their_deadline(host: EchoHost) -> None:
    job_id = str(uuid4())
    host.send(message(job_id, {"headers.expires": LONG_AGO}))
    assert host.failure(job_id).code is ErrorCode.DEADLINE_EXCEEDED
    host.answer_another()


@pytest.mark.holds(
    "docs/reliability.md#promises",
    "What runs is what the",
)
@pytest.mark.holds("docs/producers.md#from-any-language", "What runs is what the record says")
def test_a_record_that_its_producer_wrote_counts_and_not_the_message(host: EchoHost) -> None:
    """As a producer of another language sends it, whose message an attacker has seen and changed."""
    job_id = str(uuid4())
    payload = sealed_job(job_id, prompt=CONFIDENTIAL)
    record = {"state": "QUEUED", "sealed": json.dumps(payload), "priority": "normal", "submitted_at": "1.0"}
    host.redis.hset(keys.record(job_id), mapping={**record, "deadline_at": "", "attempts": "0", "max_attempts": "3"})
    host.send(message(job_id, {"body": as_body([[], {"sealed": sealed_job(job_id, prompt=LIES)}, {}])}))
    assert host.job(job_id).result(timeout=60).answer == CONFIDENTIAL
    host.answer_another()


def test_nothing_of_all_this_is_left_in_the_queue(host: EchoHost) -> None:
    host.answer_another()
    assert not any(host.redis.llen(message_list(priority)) for priority in Priority)
    assert host.foreign_keys() == []
    assert host.client.verify()[1] == []
