"""Messages that no worker can make anything of: kept for an operator, told to the caller, and never a worker's end."""

import json
from typing import Any
from uuid import uuid4

import pytest

from config.error_codes import ErrorCode
from config.event import Stage
from config.quarantine import MAX_KEPT_BYTES
from config.topology import ANALYZE_TASK, QUEUE, message_lists
from tests.integration.hostile.echo_host import EchoHost
from tests.integration.hostile.messages import (
    ABSENT,
    FORGED,
    NAN,
    SIGNED,
    as_body,
    errand,
    message,
    nested,
    sealed_job,
)

LINE_BREAK = f"a\n{FORGED}"
HUGE = 10**400

# What is not as in a good message, and a part of the reason. All name their job, by its id or as correlation_id.
TOLD: dict[str, tuple[dict[str, Any], str]] = {
    "no body": ({"body": ABSENT}, "body: Field required"),
    "empty body": ({"body": ""}, "its body is no JSON"),
    "body null": ({"body": None}, "body: Input should be a valid string"),
    "body of another kind": ({"body": [[], {}, {}]}, "body: Input should be a valid string"),
    "body not base64": ({"body": "%%%"}, "its body is no base64"),
    "body of half base64": ({"body": as_body([[], {}, {}])[:-3]}, "its body is no base64"),
    "body not ASCII": ({"body": "\u00e4\ud83d"}, "its body is no base64"),
    "body no JSON": ({"body": as_body(b"sealed: " + SIGNED.encode())}, "its body is no JSON"),
    "body cut short": ({"body": as_body(b'[[], {"sealed": {"uri": "' + SIGNED.encode())}, "its body is no JSON"),
    "body not UTF-8": ({"body": as_body(b'[[], {"sealed": "\xff\xfe"}, {}]')}, "its body is no JSON"),
    "body of many digits": ({"body": as_body(b"[[], {}, " + b"9" * 5000 + b"]")}, "its body is no JSON"),
    "body deep": ({"body": as_body(nested(100_000))}, "its body is nested too deeply"),
    "body too deep for Celery alone": ({"body": as_body(nested(960))}, ""),
    "arguments deep": ({"body": as_body(b"[[], {" + b'"job": {' * 9000 + b"}" * 9001 + b", {}]")}, "nested too deeply"),
    "body [1]": ({"body": as_body([1])}, "[args, kwargs, embedded]"),
    "body {}": ({"body": as_body({})}, "[args, kwargs, embedded]"),
    "body 7": ({"body": as_body(7)}, "[args, kwargs, embedded]"),
    "body of four parts": ({"body": as_body([[], {}, {}, {}])}, "[args, kwargs, embedded]"),
    "args a dict": ({"body": as_body([{}, {}, {}])}, "[args, kwargs, embedded]"),
    "kwargs a list": ({"body": as_body([[], [], {}])}, "[args, kwargs, embedded]"),
    "no argument": ({"body": as_body([[], {}, {}])}, "takes one argument"),
    "two arguments": ({"body": as_body([[1, 2], {}, {}])}, "takes one argument"),
    "job and sealed": ({"body": as_body([[], {"job": {}, "sealed": {}}, {}])}, "takes one argument"),
    "written, no JSON": ({"body": as_body([[], {"written": SIGNED}, {}])}, "written is no JSON"),
    "written, deep": ({"body": as_body([[], {"written": nested(9000).decode()}, {}])}, "written is nested too deeply"),
    "written, no text": ({"body": as_body([[], {"written": {}}, {}])}, "takes one argument"),
    "written, no object": ({"body": as_body([[], {"written": "[]"}, {}])}, "takes one argument"),
    "written and sealed": ({"body": as_body([[], {"written": "{}", "sealed": {}}, {}])}, "takes one argument"),
    "written, nothing asked": ({"body": as_body([[], {"written": "{}"}, {}])}, "asked: "),
    "written, asked in words": ({"body": as_body([[], {"written": '{"asked": "more"}'}, {}])}, "asked: "),
    "written, asked for NaN": ({"body": as_body([[], {"written": '{"asked": {"not_before": NaN}}'}, {}])}, "asked: "),
    "embedded a number": ({"body": as_body([[], {"sealed": 1}, 7])}, "what is to be called"),
    "callbacks a number": ({"body": as_body([[], {"sealed": 1}, {"callbacks": 7}])}, "callbacks"),
    "callbacks of numbers": ({"body": as_body([[], {"sealed": 1}, {"callbacks": [7]}])}, "callbacks.0"),
    "callback without a task": ({"body": as_body([[], {"sealed": 1}, {"callbacks": [{}]}])}, "task: Field required"),
    "a callback": ({"body": as_body([[], {"sealed": 1}, {"callbacks": [errand()]}])}, "KEYE_CELERY_CANVAS"),
    "a canvas of nothing, for a queue": (
        {
            "body": as_body(
                [[], {"sealed": 1}, {"callbacks": [errand("other-app", "celery.group", kwargs={"tasks": []})]}]
            )
        },
        "KEYE_CELERY_CANVAS",
    ),
    "protocol 1 without arguments": (
        {"headers": {}, "body": as_body({"task": ANALYZE_TASK, "id": "x"})},
        "takes one argument",
    ),
    "protocol 1 without an id": (
        {"headers": {}, "body": as_body({"task": ANALYZE_TASK, "kwargs": {"sealed": 1}})},
        "id: Field required",
    ),
    "protocol 1, args a number": (
        {"headers": {}, "body": as_body({"task": ANALYZE_TASK, "id": "x", "args": 7})},
        "[args, kwargs, embedded]",
    ),
    "protocol 1, timelimit 5": (
        {"headers": {}, "body": as_body({"task": ANALYZE_TASK, "id": "x", "kwargs": {"sealed": 1}, "timelimit": 5})},
        "timelimit",
    ),
    "protocol 1, eta soon": (
        {"headers": {}, "body": as_body({"task": ANALYZE_TASK, "id": "x", "kwargs": {"sealed": 1}, "eta": "soon"})},
        "headers.eta",
    ),
    "both protocols": ({"body": as_body({"task": ANALYZE_TASK, "id": "x"})}, "[args, kwargs, embedded]"),
    "headers a list": ({"headers": []}, "headers: Input should be a valid dictionary"),
    "headers null": ({"headers": None}, "headers: Input should be a valid dictionary"),
    "headers absent": ({"headers": ABSENT}, "[args, kwargs, embedded]"),
    "id a list": ({"headers.id": ["a"]}, "id: Input should be a valid string"),
    "id a number": ({"headers.id": 7}, "id: Input should be a valid string"),
    "id null": ({"headers.id": None}, "id: Input should be a valid string"),
    "id absent": ({"headers.id": ABSENT}, "id: Field required"),
    "id with a line break": ({"headers.id": LINE_BREAK}, "its id is no job's"),
    "task absent": ({"headers.task": ABSENT}, "[args, kwargs, embedded]"),
    "task []": ({"headers.task": []}, "task: Input should be a valid string"),
    "task of somebody else": ({"headers.task": "billing.refund"}, "'billing.refund' is none of ours"),
    "task with a line break": ({"headers.task": LINE_BREAK}, "is none of ours"),
    "task of a megabyte": ({"headers.task": "a" * 10**6}, "task: String should have at most"),
    "timelimit 5": ({"headers.timelimit": 5}, "timelimit"),
    "timelimit of three": ({"headers.timelimit": [1, 2, 3]}, "timelimit"),
    "timelimit in words": ({"headers.timelimit": ["long", None]}, "timelimit.0"),
    "eta soon": ({"headers.eta": "soon"}, "headers.eta: no time as ISO 8601 has it"),
    "eta beyond all years": ({"headers.eta": "10000-01-01T00:00:00"}, "headers.eta: no time"),
    "eta a list": ({"headers.eta": []}, "eta: Input should be a valid string"),
    "eta with a line break": ({"headers.eta": LINE_BREAK}, "headers.eta: no time"),
    "expires []": ({"headers.expires": []}, "expires: Input should be a valid string"),
    "expires NaN": ({"headers.expires": NAN}, "expires: Input should be a valid string"),
    "retries NaN": ({"headers.retries": NAN}, "retries"),
    "retries in words": ({"headers.retries": "many"}, "retries: Input should be a valid integer"),
    "group a list": ({"headers.group": ["g"]}, "group: Input should be a valid string"),
    "group_index in words": ({"headers.group_index": "last"}, "group_index: Input should be a valid integer"),
    "root_id a dict": ({"headers.root_id": {}}, "root_id: Input should be a valid string"),
    "stamps 7": ({"headers.stamps": 7}, "stamps: Input should be a valid dictionary"),
    "stamped_headers 7": ({"headers.stamped_headers": 7}, "stamped_headers: Input should be a valid list"),
    "shadow a dict": ({"headers.shadow": {}}, "shadow: Input should be a valid string"),
    "argsrepr a list": ({"headers.argsrepr": []}, "argsrepr: Input should be a valid string"),
    "ignore_result in words": ({"headers.ignore_result": "perhaps"}, "ignore_result"),
    "compressed, they say": ({"headers.compression": "application/x-bz2"}, "compressed"),
    "compressed in a way nobody knows": ({"headers.compression": ["x"]}, "compressed"),
    "content-type []": ({"content-type": []}, "content-type"),
    "content-type absent": ({"content-type": ABSENT}, "content-type: Field required"),
    "content-type of pickle": ({"content-type": "application/x-python-serialize"}, "content-type"),
    "content-encoding 7": ({"content-encoding": 7}, "content-encoding"),
    "content-encoding of nobody": ({"content-encoding": "rot13"}, "content-encoding"),
    "body_encoding of nobody": ({"properties.body_encoding": "rot13"}, "body_encoding"),
    "body_encoding []": ({"properties.body_encoding": []}, "body_encoding"),
    "delivery_tag []": ({"properties.delivery_tag": []}, "delivery_tag"),
    "delivery_tag null": ({"properties.delivery_tag": None}, "delivery_tag"),
    "delivery_tag absent": ({"properties.delivery_tag": ABSENT}, "delivery_tag"),
    "delivery_info absent": ({"properties.delivery_info": ABSENT}, "delivery_info: Field required"),
    "delivery_info a list": ({"properties.delivery_info": []}, "delivery_info"),
    "delivery_info empty": ({"properties.delivery_info": {}}, "delivery_info.exchange: Field required"),
    "exchange a dict": ({"properties.delivery_info.exchange": {}}, "delivery_info.exchange"),
    "priority NaN": ({"properties.priority": NAN}, "priority"),
    "priority a list": ({"properties.priority": [3]}, "priority"),
    "every header wrong": (
        {f"headers.{name}": [] for name in ("eta", "expires", "retries", "group", "shadow", "stamps", "timelimit")},
        "8 faults",
    ),
}

# Those that name no job.
UNTOLD: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "it is no JSON"),
    "blanks": (b"  \n", "it is no JSON"),
    "no JSON": (SIGNED.encode(), "it is no JSON"),
    "cut short": (message("cut-short")[:-2], "it is no JSON"),
    "not UTF-8": (b'{"body": "\xff\xfe"}', "it is no JSON"),
    "bytes of all kinds": (bytes(range(256)), "it is no JSON"),
    "half a surrogate pair in UTF-8": (b'{"body": "\xed\xa0\xbd"', "it is no JSON"),
    "pickle": (b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x07secrets\x94.", "it is no JSON"),
    "a list": (b"[1]", "it is no JSON object"),
    "a list of a list": (b"[[]]", "it is no JSON object"),
    "a number": (b"7", "it is no JSON object"),
    "a number of many digits": (b"9" * 5000, "it is no JSON"),
    "NaN": (b"NaN", "it is no JSON object"),
    "null": (b"null", "it is no JSON object"),
    "text": (b'"keye.analyze"', "it is no JSON object"),
    "an empty object": (b"{}", "properties: Field required"),
    "deep": (nested(100_000), "it is nested too deeply"),
    "deep in an object": (b'{"headers":' * 50_000, "it is nested too deeply"),
    "properties a list": (message("x", {"properties": [], "headers.id": "no id"}), "properties: Input should be"),
    "properties absent": (message("x", {"properties": ABSENT, "headers.id": "no id"}), "properties: Field required"),
    "id with half a character": (
        message("x", {"headers.id": "a\ud83d", "properties.correlation_id": "a\ud83d"}),
        "id: Input should be a valid string",
    ),
    **{
        f"id {what}": (message("x", {"headers.id": job_id, "properties.correlation_id": job_id}), "its id is no job's")
        for what, job_id in {
            "empty": "",
            "of a blank": " ",
            "of 129 letters": "a" * 129,
            "of a stream of events": "x:events",
            "with a line break": LINE_BREAK,
            "with a line break behind it": "a\n",
            "with a NUL": "a\0",
            "of another alphabet": "\u0430",
            "with an escape": "a\x1b[31m",
            "as a path": "../../etc/passwd",
            "as a pattern": "*",
        }.items()
    },
}


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


@pytest.mark.parametrize("kind", UNTOLD)
def test_what_names_no_job_is_kept_with_a_reason(host: EchoHost, kind: str) -> None:
    raw, reason = UNTOLD[kind]
    host.send(raw)
    host.answer_another()
    kept = host.quarantined(raw)
    assert reason in kept.reason
    assert kept.job_id is None


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
    job_ids = {depth: str(uuid4()) for depth in range(240, 1040)}
    for depth, job_id in job_ids.items():
        text = json.dumps([[], {"sealed": sealed_job(job_id, metadata={"deep": "HERE"})}, {}]).encode()
        host.send(message(job_id, {"body": as_body(text.replace(b'"HERE"', nested(depth)))}))
    host.answer_another()
    assert {
        depth for depth, job_id in job_ids.items() if host.failure(job_id).code is not ErrorCode.INVALID_JOB
    } == set()


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
