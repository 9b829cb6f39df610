"""Messages as no client of ours writes them, drawn by Hypothesis: a good one with any part of it changed."""

import bz2
import json
import math
import uuid
import zlib
from base64 import b64encode
from typing import Any

from hypothesis import strategies as st

from keye.config.topology import ANALYZE_TASK, QUEUE

_TEXT = st.text(max_size=20) | st.sampled_from(["", "\0", "\n", "\ud83d", "x:events", "*", "a" * 200, "../..", "-1"])
_SCALAR = st.none() | st.booleans() | st.integers() | st.sampled_from([10**400, -1, math.nan, math.inf]) | _TEXT
JUNK = st.recursive(
    _SCALAR | st.just({"__type__": "datetime", "__value__": 5}),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
# All that Celery or kombu look at.
HEADERS = (
    *("task", "id", "lang", "eta", "expires", "timelimit", "retries", "group", "group_index", "root_id", "parent_id"),
    *("shadow", "argsrepr", "kwargsrepr", "origin", "ignore_result", "stamps", "stamped_headers", "compression"),
    *("replaced_task_nesting", "meth", "redelivered", "x-death", "clock", "reply_to", "callbacks"),
)
PROPERTIES = (
    *("correlation_id", "delivery_tag", "delivery_mode", "delivery_info", "priority", "body_encoding", "reply_to"),
    *("content_type", "headers"),
)
FIELDS = ("body", "content-type", "content-encoding", "headers", "properties")


def errand(task: str = "billing.refund", queue: str = "other-app") -> dict[str, Any]:
    return {
        "task": task,
        "args": [],
        "kwargs": {},
        "options": {"queue": queue},
        "subtask_type": None,
        "immutable": True,
        "chord_size": 1,
    }


_ERRANDS = st.sampled_from([errand(), errand(queue="keye:leases"), errand("celery.group"), errand("keye.analyze")])
_EMBEDDED = JUNK | st.fixed_dictionaries(
    {},
    optional={
        "callbacks": JUNK | st.lists(_ERRANDS, max_size=2),
        "errbacks": JUNK | st.lists(_ERRANDS, max_size=2),
        "chain": JUNK | st.lists(_ERRANDS, max_size=2),
        "chord": JUNK | _ERRANDS,
    },
)
_TASKS = JUNK | st.sampled_from(["celery.map", "celery.chord_unlock", "celery.group", "keye.analyse"])


def _now_and_then(strange: st.SearchStrategy[Any], usual: Any) -> st.SearchStrategy[Any]:
    """Hypothesis draws what comes first most often."""
    return st.integers(0, 9).flatmap(lambda number: strange if number == 7 else st.just(usual))


@st.composite
def _arguments(draw: st.DrawFn, job_id: str) -> Any:
    # Never what the echo worker takes for an order, such as to die.
    job: Any = {"prompt": "said " + draw(st.text(max_size=10)), "metadata": {"any": draw(_SCALAR)}}
    sealed: Any = {"schema_version": 1, "job_id": job_id, "submitted_at": 1.0, "job": job}
    for part in (sealed, job):
        if draw(st.booleans()):
            part[draw(st.sampled_from([*part, "unknown"]))] = draw(JUNK)
    if draw(st.integers(0, 9)) == 0:
        sealed = json.dumps(sealed)
    names = st.sampled_from(
        [{"sealed": sealed}, {"job": job}, {"sealed": sealed, "asked": draw(JUNK)}, {"prompt": "x"}]
    )
    return draw(names | JUNK)


@st.composite
def _body(draw: st.DrawFn, job_id: str, headers: dict[str, Any]) -> str:
    arguments = draw(_arguments(job_id))
    content: Any = [draw(_now_and_then(JUNK, [])), arguments, draw(_now_and_then(_EMBEDDED, {}))]
    match draw(st.integers(0, 19)):
        case 14:
            content = draw(JUNK)
        case 15:
            content = {"task": ANALYZE_TASK, "id": job_id, "args": [], "kwargs": arguments}
            headers.pop("task", None)
        case 16:
            return draw(st.text(max_size=30))
        case 17:
            return b64encode(draw(st.binary(max_size=30))).decode()
        case 18:
            return b64encode(b"[" * draw(st.sampled_from([10, 5_000, 200_000]))).decode()
        case 19:
            headers["compression"] = draw(st.sampled_from(["application/x-bz2", "application/x-gzip", "zlib"]))
            press = draw(st.sampled_from([bz2.compress, zlib.compress]))
            return b64encode(press(json.dumps(content).encode() + b" " * 10**6)).decode()
    return b64encode(json.dumps(content).encode()).decode()


@st.composite
def hostile_messages(draw: st.DrawFn) -> tuple[bytes, str, bool]:
    """The message, the job it is about, and whether its headers name that, so that its caller has to hear of it."""
    # Not drawn: Hypothesis likes to say the same twice, and the second would be told of by the first's outcome.
    job_id = str(uuid.uuid4())
    if draw(_now_and_then(st.booleans(), False)):
        return draw(st.binary(max_size=60)), job_id, False
    headers: dict[str, Any] = {"task": draw(_now_and_then(_TASKS, ANALYZE_TASK)), "id": job_id, "lang": "xx"}
    properties: dict[str, Any] = {
        "correlation_id": None,
        "delivery_tag": "tag",
        "delivery_info": {"exchange": "", "routing_key": QUEUE},
        "priority": draw(st.integers(0, 9)),
        "body_encoding": "base64",
    }
    message: dict[str, Any] = {"content-type": "application/json", "content-encoding": "utf-8"}
    message |= {"body": draw(_body(job_id, headers)), "headers": headers, "properties": properties}
    for _ in range(draw(st.integers(0, 2))):
        part, names = draw(st.sampled_from([(headers, HEADERS), (properties, PROPERTIES), (message, FIELDS)]))
        name = draw(st.sampled_from(names))
        if draw(st.booleans()):
            part.pop(name, None)
        else:
            part[name] = draw(JUNK)
    raw = json.dumps(message).encode()
    if draw(_now_and_then(st.booleans(), False)):
        return raw[: draw(st.integers(0, len(raw) - 1))], job_id, False
    given = message.get("headers")
    return raw, job_id, isinstance(given, dict) and given.get("id") == job_id
