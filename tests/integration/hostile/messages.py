"""Messages by hand: a good one as `docs/producers.md` has it, and any part of it changed."""

import json
import math
from base64 import b64encode
from collections.abc import Mapping
from typing import Any

from keye.config.topology import ANALYZE_TASK, QUEUE

ABSENT = object()
# Stands in the body of every message here, as a signed URL would.
SECRET = "Hush7Hush"
SIGNED = f"https://store.example/a.png?X-Amz-Signature={SECRET}"
FORGED = "[2026-01-01 00:00:00,000: CRITICAL/MainProcess] forged"
LINE_BREAK = f"a\n{FORGED}"
NAN = math.nan
HUGE = 10**400


def sealed_job(job_id: str, prompt: str = "asked by hand", **fields: Any) -> dict[str, Any]:
    """`fields` are the job's; one that is ABSENT is left out."""
    job = {"prompt": prompt, "metadata": {"source": SIGNED}, **fields}
    job = {name: value for name, value in job.items() if value is not ABSENT}
    return {"schema_version": 1, "job_id": job_id, "submitted_at": 1.0, "job": job}


def message(
    job_id: str,
    changes: Mapping[str, Any] | None = None,
    *,
    sealed: Any = None,
    kwargs: Any = None,
    embedded: Any = None,
    content: Any = None,
) -> bytes:
    """`changes` are by dotted path, ABSENT takes away; of the others each replaces a part of the body."""
    kwargs = {"sealed": sealed if sealed is not None else sealed_job(job_id)} if kwargs is None else kwargs
    content = [[], kwargs, embedded or {}] if content is None else content
    whole: dict[str, Any] = {
        "body": as_body(content),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {"task": ANALYZE_TASK, "id": job_id, "lang": "xx"},
        "properties": {
            "correlation_id": job_id,
            "delivery_tag": "by hand",
            "delivery_info": {"exchange": "", "routing_key": QUEUE},
            "priority": 3,
            "body_encoding": "base64",
        },
    }
    for path, value in (changes or {}).items():
        *parents, name = path.split(".")
        part: dict[str, Any] = whole
        for parent in parents:
            part = part[parent]
        if value is ABSENT:
            del part[name]
        else:
            part[name] = value
    return json.dumps(whole).encode()


def command(method: str, changes: Mapping[str, Any] | None = None, **body: Any) -> bytes:
    """A broadcast as Celery's remote control writes it; `changes` as those of `message`."""
    content = {"method": method, "arguments": {}, "destination": None, "pattern": None, "matcher": None, **body}
    routing = {"properties.delivery_info": {"exchange": "celery.pidbox", "routing_key": ""}, "headers": {"clock": 1}}
    return message("of-a-command", {**routing, **(changes or {})}, content=content)


def as_body(content: Any) -> str:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return b64encode(text).decode()


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


def errand(queue: Any = "other-app", task: str = "billing.refund", **fields: Any) -> dict[str, Any]:
    """A Celery signature, for somebody else's queue."""
    options = {} if queue is None else {"queue": queue}
    signature = {"task": task, "args": [SIGNED], "kwargs": {}, "subtask_type": None, "immutable": True}
    return {**signature, "chord_size": 1, **fields, "options": {**options, **fields.get("options", {})}}


def canvas(kind: str, options: Mapping[str, Any] | None = None, **kwargs: Any) -> dict[str, Any]:
    """A signature that holds others, as Celery writes groups, chains and chords."""
    return errand(None, f"celery.{kind}", args=[], kwargs=kwargs, subtask_type=kind, options=dict(options or {}))
