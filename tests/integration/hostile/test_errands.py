"""Whoever may only LPUSH messages makes nothing but jobs happen: a worker runs no errands that nobody has allowed."""

import json
from typing import Any
from uuid import uuid4

import pytest
from redis.exceptions import NoPermissionError

from keye.config import keys
from keye.config.codes import ErrorCode
from keye.config.job import Priority
from tests.integration.hostile.echo_host import BROADCASTS, MESSAGES, EchoHost
from tests.integration.hostile.errands import ALLOWED, EMBEDDED, GROUPED, NO_TASK_OF_OURS, REPORT, TASKS, UNCALLABLE
from tests.integration.hostile.messages import ABSENT, as_body, errand, message, sealed_job
from tests.support.conditions import eventually

SETTINGS = {"KEYE_CELERY_CANVAS": ALLOWED}


def assert_nothing_but_jobs(host: EchoHost) -> None:
    host.answer_another()
    assert host.foreign_keys() == []
    running = host.client.submit(prompt="wait 0.3", priority=Priority.HIGH)
    eventually(lambda: host.redis.zscore(keys.LEASES, running.id) is not None)
    assert host.redis.type(keys.LEASES) == "zset"
    assert running.result(timeout=60).answer == "wait 0.3"


@pytest.mark.holds("docs/design.md#decisions", "what it asks to have called is called")
@pytest.mark.parametrize("is_failing", [False, True], ids=["answered", "failed"])
@pytest.mark.parametrize("kind", EMBEDDED)
def test_what_is_to_be_called_afterwards_is_refused(host: EchoHost, kind: str, is_failing: bool) -> None:
    embedded, reason = EMBEDDED[kind]
    job_id = str(uuid4())
    sealed = sealed_job(job_id, **({"prompt": ABSENT} if is_failing else {}))
    raw = message(job_id, GROUPED, sealed=sealed, embedded=embedded)
    host.send(raw)
    assert reason in host.quarantined(raw).reason
    assert host.failure(job_id).code is ErrorCode.INVALID_JOB
    assert_nothing_but_jobs(host)


@pytest.mark.holds(
    "docs/reliability.md#promises",
    "Whoever may only push messages",
)
@pytest.mark.parametrize("task", TASKS)
def test_only_our_task_exists_in_a_worker(host: EchoHost, task: str) -> None:
    job_id = str(uuid4())
    raw = message(job_id, {"headers.task": task}, content=TASKS[task])
    host.send(raw)
    assert NO_TASK_OF_OURS in host.quarantined(raw).reason
    assert host.failure(job_id).code is ErrorCode.INVALID_JOB
    assert_nothing_but_jobs(host)


def test_the_first_protocol_has_no_way_around_it(host: EchoHost) -> None:
    for name, called in (("callbacks", [errand()]), ("errbacks", [errand()]), ("chord", errand())):
        job_id = str(uuid4())
        body = {
            "task": "keye.analyze",
            "id": job_id,
            "args": [],
            "kwargs": {"sealed": sealed_job(job_id)},
            name: called,
        }
        raw = message(job_id, {"headers": {}, "body": as_body(body)})
        host.send(raw)
        assert "which KEYE_CELERY_CANVAS does not name" in host.quarantined(raw).reason
    assert_nothing_but_jobs(host)


def test_what_workers_tell_each_other_of_a_message_is_no_way_around_it(host: EchoHost) -> None:
    for canvas in ({"callbacks": [errand()]}, {"chain": [errand()]}, {"errbacks": [errand()]}, {"chord": errand()}):
        job_id = str(uuid4())
        written = json.dumps({"sealed": sealed_job(job_id), "asked": {"canvas": canvas}})
        raw = message(job_id, kwargs={"written": written})
        host.send(raw)
        assert "which KEYE_CELERY_CANVAS does not name" in host.quarantined(raw).reason
    assert_nothing_but_jobs(host)


HARMLESS: dict[str, dict[str, Any]] = {
    "reply_to": {"properties.reply_to": "other-app", "headers.reply_to": "keye:leases"},
    "routing": {"properties.delivery_info": {"exchange": "other-app", "routing_key": "other-app"}},
    "routing to a key of ours": {"properties.delivery_info": {"exchange": "", "routing_key": "keye:leases"}},
    "group": GROUPED,
    "stamps": {"headers.stamps": {"other-app": [errand()]}, "headers.stamped_headers": ["other-app"]},
    "callbacks among the headers": {"headers.callbacks": [errand()], "headers.chain": [errand()]},
    "replacement": {"headers.replaced_task_nesting": 1},
    "expired long ago, in words for kombu": {"properties.expiration": "0", "properties.message_ttl": 0},
}


@pytest.mark.holds(
    "docs/reliability.md#promises",
    "Each is read before kombu",
)
@pytest.mark.holds(
    "docs/celery.md#how-do-i-use-it-from-celery",
    "A worker writes each message",
)
@pytest.mark.parametrize("kind", HARMLESS)
def test_what_could_lead_an_answer_elsewhere_does_not(host: EchoHost, kind: str) -> None:
    job_id = str(uuid4())
    host.send(message(job_id, HARMLESS[kind]))
    assert host.celery_result(job_id)["status"] == "SUCCESS"
    assert_nothing_but_jobs(host)


@pytest.mark.parametrize("part", ["callbacks", "chain"])
def test_what_is_allowed_is_called_once_with_the_outcome(host: EchoHost, part: str) -> None:
    job_id = str(uuid4())
    host.send(message(job_id, embedded={part: [{**REPORT, "immutable": False}]}))
    (called,) = eventually(lambda: host.redis.lrange("reports", 0, -1))
    assert json.loads(called)["headers"]["task"] == "report.done"
    host.answer_another()
    assert host.redis.llen("reports") == 1
    host.redis.delete("reports")
    assert_nothing_but_jobs(host)


@pytest.mark.parametrize("kind", UNCALLABLE)
def test_what_is_allowed_and_cannot_be_called_costs_nobody_anything(host: EchoHost, kind: str) -> None:
    job_id = str(uuid4())
    host.send(message(job_id, embedded={"callbacks": [errand("reports", "report.done", options=UNCALLABLE[kind])]}))
    eventually(lambda: host.redis.exists(keys.record(job_id)))
    host.answer_another()
    host.redis.delete("reports")
    assert_nothing_but_jobs(host)


@pytest.mark.parametrize("marked", [{"__type__": "datetime", "__value__": 7}, {"__type__": "nonsense", "__value__": 7}])
def test_what_is_allowed_reaches_it_with_the_arguments_it_was_given(host: EchoHost, marked: dict[str, Any]) -> None:
    job_id = str(uuid4())
    host.send(message(job_id, embedded={"callbacks": [{**REPORT, "args": [marked]}]}))
    assert host.celery_result(job_id)["status"] == "SUCCESS"
    host.answer_another()
    host.redis.delete("reports")


def test_the_neighbour_of_these_tests_may_do_no_more(host: EchoHost) -> None:
    sender, caster = host.neighbours
    for forbidden in (
        lambda: sender.lpush("other-app", "x"),
        lambda: sender.rpush(MESSAGES, "x"),
        lambda: sender.get("celery-task-meta-x"),
        lambda: sender.publish(BROADCASTS, "x"),
        lambda: caster.lpush(MESSAGES, "x"),
        lambda: caster.publish(keys.CANCELLATIONS, "x"),
    ):
        with pytest.raises(NoPermissionError):
            forbidden()
