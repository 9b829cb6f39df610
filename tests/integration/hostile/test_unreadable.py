"""Messages that no worker can make anything of: kept for an operator, told to the caller, and never a worker's end."""

import json
from typing import Any
from uuid import uuid4

import pytest

from keye.config.codes import ErrorCode, Stage
from keye.config.quarantine import MAX_KEPT_BYTES
from keye.config.topology import QUEUE, message_lists
from tests.integration.hostile.echo_host import EchoHost
from tests.integration.hostile.messages import (
    FORGED,
    HUGE,
    LINE_BREAK,
    NAN,
    SIGNED,
    as_body,
    errand,
    message,
    nested,
    sealed_job,
)
from tests.integration.hostile.unreadable import TOLD, UNTOLD


@pytest.mark.holds("docs/producers.md#from-any-language", "A message that cannot be read is put into quarantine")
@pytest.mark.holds(
    "docs/reliability.md#promises",
    "What cannot be read is",
)
@pytest.mark.holds(
    "docs/celery.md#what-celerys-options-do",
    "A message with what is",
)
@pytest.mark.holds(
    "docs/operations.md#what-became-of-a-message-that-no-worker-could-read",
    "that job ends with an error, which its caller sees",
)
@pytest.mark.parametrize("kind", TOLD)
def test_it_is_kept_with_a_reason_and_its_caller_hears_of_it(host: EchoHost, kind: str) -> None:
    changes, reason = TOLD[kind]
    job_id = str(uuid4())
    raw = message(job_id, changes)
    host.send(raw)
    host.answer_another()
    kept = host.quarantined(raw)
    assert reason in kept.reason
    assert kept.job_id == job_id
    failure = host.failure(job_id)
    assert (failure.code, failure.stage) == (ErrorCode.INVALID_JOB, Stage.OPEN)
    assert failure.message == f"The message could not be read: {kept.reason}."
    assert host.celery_result(job_id)["status"] == "FAILURE"


@pytest.mark.holds(
    "docs/operations.md#what-became-of-a-message-that-no-worker-could-read",
    "It is in quarantine: the stream `keye:quarantine`",
)
@pytest.mark.parametrize("kind", UNTOLD)
def test_what_names_no_job_is_kept_with_a_reason(host: EchoHost, kind: str) -> None:
    raw, reason = UNTOLD[kind]
    host.send(raw)
    host.answer_another()
    kept = host.quarantined(raw)
    assert reason in kept.reason
    assert kept.job_id is None


@pytest.mark.holds("docs/operations.md#what-became-of-a-message-that-no-worker-could-read", "of each the first 64 KiB")
def test_what_is_kept_is_what_was_sent_up_to_a_bound(host: EchoHost) -> None:
    raw = message(str(uuid4()), {"headers.retries": "many", "headers.shadow": "a" * 100_000})
    host.send(raw)
    kept = host.quarantined(raw)
    assert (kept.raw, kept.size) == (raw[:MAX_KEPT_BYTES], len(raw))


def test_a_reason_is_short_however_many_faults_there_are(host: EchoHost) -> None:
    many = {
        "stamps of numbers": message(str(uuid4()), {"headers.stamped_headers": [7] * 10_000}),
        "callbacks of numbers": message(str(uuid4()), embedded={"callbacks": [7] * 10_000}),
        "options of nobody": message(
            str(uuid4()), embedded={"chain": [errand(options={f"{FORGED}\n{SIGNED}" * 100: 1})]}
        ),
    }
    for raw in many.values():
        host.send(raw)
        assert len(host.quarantined(raw).reason) < 1100
    host.answer_another()


def test_a_job_of_any_depth_is_refused_and_never_lost(host: EchoHost) -> None:
    """What the door can read, Celery and the task behind it may not: each has a bit less of the stack."""
    job_ids = {depth: str(uuid4()) for depth in range(240, 1040, 3)}
    for depth, job_id in job_ids.items():
        text = json.dumps([[], {"sealed": sealed_job(job_id, metadata={"deep": "HERE"})}, {}]).encode()
        host.send(message(job_id, {"body": as_body(text.replace(b'"HERE"', nested(depth)))}))
    host.answer_another()
    assert {
        depth for depth, job_id in job_ids.items() if host.failure(job_id).code is not ErrorCode.INVALID_JOB
    } == set()


@pytest.mark.holds(
    "docs/operations.md#what-became-of-a-message-that-no-worker-could-read",
    "a job that nobody has sent otherwise",
)
def test_a_broken_message_does_not_harm_the_job_that_it_names(host: EchoHost) -> None:
    with host.frozen():
        job = host.client.submit(prompt="asked well")
        host.send(message(job.id, {"body": "%%%"}), QUEUE)
    assert job.result(timeout=60).answer == "asked well"
    host.answer_another()


@pytest.mark.parametrize("queue", message_lists())
def test_the_list_of_every_priority_is_read(host: EchoHost, queue: str) -> None:
    job_id = str(uuid4())
    raw = message(f"broken-{job_id}", {"body": ""})
    host.send(raw, queue)
    host.send(message(job_id), queue)
    host.quarantined(raw)
    assert host.celery_result(job_id)["status"] == "SUCCESS"


UNUSUAL: dict[str, dict[str, Any]] = {
    "no encodings": {"content-encoding": None, "properties.priority": None},
    "a priority out of range": {"properties.priority": HUGE},
    "one below": {"properties.priority": -HUGE},
    "retries without end": {"headers.retries": HUGE},
    "a tag that is a number": {"properties.delivery_tag": HUGE},
    "stamps of all kinds": {"headers.stamps": {"a\n": NAN}, "headers.stamped_headers": ["a\n"]},
    "a time limit that is no number": {"headers.timelimit": [NAN, None]},
    "no time at all": {"headers.timelimit": [0, 0]},
    "a reply to somebody else": {"properties.reply_to": "other-app", "headers.reply_to": "other-app"},
    "another way here": {"properties.delivery_info": {"exchange": "other-app", "routing_key": "other-app"}},
    "a past in another queue": {"headers.x-death": [{"queue": "other-app"}], "headers.redelivered": True},
    "a result that nobody wants": {"headers.ignore_result": True},
    "Python's own types": {"headers.argsrepr": '{"__type__": "bytes", "__value__": 7}'},
    "a name for show": {"headers.shadow": LINE_BREAK, "headers.origin": LINE_BREAK},
    "fields of a later Celery": {"headers.later": {"deep": [[]]}, "properties.later": 7, "later": None},
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_what_is_only_unusual_is_answered(host: EchoHost, kind: str) -> None:
    job_id = str(uuid4())
    host.send(message(job_id, UNUSUAL[kind]))
    assert host.celery_result(job_id)["status"] == "SUCCESS"
    assert host.job(job_id).result(timeout=60).answer == "asked by hand"
    host.answer_another()
    assert host.foreign_keys() == []


def test_objects_that_celery_would_make_python_of_reach_the_job_as_they_are(host: EchoHost) -> None:
    metadata = [{"__type__": name, "__value__": 7} for name in ("datetime", "bytes", "uuid", "nonsense")]
    job_id = str(uuid4())
    host.send(message(job_id, sealed=sealed_job(job_id, metadata={"a": metadata})))
    assert host.celery_result(job_id)["status"] == "SUCCESS"
    assert host.job(job_id).result(timeout=60).metadata == {"a": metadata}
    host.answer_another()
