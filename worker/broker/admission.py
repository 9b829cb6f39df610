"""What reaches Celery of what lies in the queue: messages written anew from what they ask, and nothing else of them.

Those that no worker can read lie in quarantine, where an operator finds them: see `keye.producer.dead_letters`.
"""

import json
import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from redis import Redis
from redis.exceptions import RedisError

from keye.config import keys
from keye.config.connection import ArgumentTooLarge, check_arguments
from keye.config.contract import version_of
from keye.config.job import RULE, AnalysisJob, Priority, is_job_id, is_traceparent
from keye.config.quarantine import MAX_MESSAGES, entry_of
from keye.config.topology import ANALYZE_TASK, PRIORITY_STEPS, RECORDED, body_of, job_named_by, message_around
from keye.worker.broker.canvas import NOTHING_ASKED, Asked, Canvas
from keye.worker.broker.envelope import Headers, Unreadable, parse, read_envelope, validated

log = logging.getLogger(__name__)


class Quarantine:
    """Bounded, there and here: what Redis does not take waits for `deliver`. Any thread may call."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._worker = f"{socket.gethostname()}:{os.getpid()}"
        self._waiting: deque[dict[Any, Any]] = deque(maxlen=MAX_MESSAGES)

    def put(self, raw: bytes, reason: str, job_id: str | None) -> None:
        self._waiting.append(dict(entry_of(raw, reason, self._worker, job_id)))
        try:
            self.deliver()
        except RedisError as fault:
            log.warning("%d messages wait to be put into quarantine: %s", len(self._waiting), fault)

    def deliver(self) -> None:
        """Write what waits. Raises the fault of a Redis that is away."""
        while self._waiting:
            try:
                entry = self._waiting.popleft()
            except IndexError:
                return  # another thread had it
            try:
                self._redis.xadd(keys.QUARANTINE, entry, maxlen=MAX_MESSAGES, approximate=False)
            except RedisError:
                self._waiting.appendleft(entry)
                raise


class Admission:
    """The door: called with each message as it was taken from its list, before kombu reads it.

    `canvas` are the patterns of KEYE_CELERY_CANVAS. While it is not `is_open`, or `has_room` says so of the number of
    messages that are taken and not acknowledged, no more are taken.
    """

    def __init__(self, redis: Redis, quarantine: Quarantine, canvas: Sequence[str]) -> None:
        self.is_open = True
        self.has_room: Callable[[int], bool] = lambda _: True
        self._redis = redis
        self._quarantine = quarantine
        self._canvas = canvas

    def __json__(self) -> str:
        """For kombu: `inspect stats` tells the transport's options, of which this is one."""
        return type(self).__name__

    def takes_more(self, num_taken: int) -> bool:
        return self.is_open and self.has_room(num_taken)

    def __call__(self, raw: bytes) -> str | None:
        """The message that Celery gets; None where it gets none. What cannot be read is in quarantine then."""
        try:
            message = read_message(raw, self._canvas)
            # Of a Redis that is away its thread will hear.
            with suppress(RedisError):
                check_arguments(self._redis, (message,))
            return message
        except (Unreadable, ArgumentTooLarge) as fault:
            reason = str(fault)
        except Exception as fault:
            # Of ours, then; the message has caused it all the same.
            log.exception("A fault in reading a message")
            reason = f"reading it raised {type(fault).__name__}"
        job_id = _job_of(raw)
        log.warning("a message is in quarantine: %s", reason, extra={} if job_id is None else {"job_id": job_id})
        self._quarantine.put(raw, reason, job_id)
        if job_id is None:
            return None
        # Its caller hears of it as of any other job.
        asked = Asked(refused=f"The message could not be read: {reason}.")
        return _written(job_id, None, asked, PRIORITY_STEPS[Priority.NORMAL], is_recorded=False)

    def note_record(self, message: Any) -> None:
        """Have a message that goes back into the queue say that its job has a record, if it has one by now."""
        match message, job_named_by(message):
            case {"headers": dict(headers)}, str(job_id) if self._redis.exists(keys.record(job_id)):
                headers[RECORDED] = True


def read_message(raw: bytes, canvas: Sequence[str]) -> str:
    """The same job as a message of ours. Raises `Unreadable`."""
    envelope = read_envelope(parse(raw, "it"))
    content = envelope.content()
    headers, args, kwargs, embedded = _protocol(envelope.headers, content)
    if headers.task != ANALYZE_TASK:
        raise Unreadable(f"the task {headers.task[:80]!r} is none of ours, {ANALYZE_TASK!r} is the only one")
    if not is_job_id(headers.id):
        raise Unreadable(f"its id is no job's: that is {RULE}")
    step = min(max(envelope.properties.priority or 0, 0), 9) // 3 * 3
    sealed, asked = _arguments(headers, args, kwargs, step)
    asks = {
        "not_before": _timestamp(headers.eta, "eta"),
        "expires_at": _timestamp(headers.expires, "expires"),
        "canvas": Canvas.of(embedded, headers),
    }
    if asks := {name: value for name, value in asks.items() if value is not None}:
        asked = asked.model_copy(update=asks)
    if asked.canvas is not None:
        asked.canvas.require(canvas)
    return _written(headers.id, sealed, asked, min(step, 6), headers.keye_recorded or False)


def _protocol(headers: dict[str, Any], content: Any) -> tuple[Headers, list[Any], dict[str, Any], Any]:
    """Headers, args, kwargs and embedded. By protocol 2 headers say which task it is, by 1 the body does."""
    match content:
        case [list(args), dict(kwargs), embedded] if "task" in headers:
            return validated(Headers, headers, "headers"), args, kwargs, embedded
        case {"task": _} if "task" not in headers:
            args, kwargs = content.get("args") or [], content.get("kwargs") or {}
            if isinstance(args, list) and isinstance(kwargs, dict):
                embedded = {name: content.get(name) for name in ("callbacks", "errbacks", "chord")}
                return validated(Headers, content, "body"), args, kwargs, embedded
    raise Unreadable("its body is not what Celery's protocols 1 and 2 call a task: [args, kwargs, embedded]")


def _arguments(headers: Headers, args: list[Any], kwargs: dict[str, Any], step: int) -> tuple[Any, Asked]:
    """`sealed` is what our producers send; of `job`, as it is written by hand, the task's id is the job's."""
    match args, kwargs:
        case ([sealed], {**rest}) | ([], {"sealed": sealed, **rest}) if not rest:
            return sealed, NOTHING_ASKED
        # Ours, of a message that has passed before: see `_written`.
        case [], {"written": str(written), **rest} if not rest:
            arguments = parse(written.encode(errors="surrogatepass"), "written")
            if isinstance(arguments, dict):
                return arguments.get("sealed"), validated(Asked, arguments.get("asked"), "asked")
        case [], {"job": job, **rest} if not rest:
            if isinstance(job, dict) and step and "priority" not in job:
                job = job | {"priority": {3: Priority.NORMAL}.get(step, Priority.LOW).value}
            if isinstance(job, dict) and is_traceparent(headers.traceparent):
                job = {"traceparent": headers.traceparent} | job
            return {
                "schema_version": _version_of(job),
                "job_id": headers.id,
                "submitted_at": time.time(),
                "job": job,
            }, NOTHING_ASKED
    raise Unreadable(f"{ANALYZE_TASK} takes one argument: job, the fields of a job, or sealed")


def _version_of(job: Any) -> int:
    """The lowest that knows the fields of a job that was written by hand; whether they fit is looked at later."""
    fields = AnalysisJob.model_fields
    return max((version_of(fields[name]) for name in job if name in fields), default=1) if isinstance(job, dict) else 1


def _written(task_id: str, sealed: Any, asked: Asked, step: int, is_recorded: bool) -> str:
    body = body_of({"sealed": sealed})
    # kombu would make Python objects of some; a release that knows nothing of what is asked should not ignore it.
    if asked is not NOTHING_ASKED or "__type__" in body:
        arguments = {"sealed": sealed, "asked": asked.model_dump(mode="json", exclude_none=True)}
        body = body_of({"written": json.dumps(arguments)})
    return message_around(body, task_id, step, is_recorded)


def _timestamp(text: str | None, name: str) -> float | None:
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise Unreadable(f"headers.{name}: no time as ISO 8601 has it") from None


def _job_of(raw: bytes) -> str | None:
    """The id of the job that a message names, however broken the rest of it is."""
    with suppress(Unreadable):
        message = parse(raw, "it")
        if (job_id := job_named_by(message)) is not None:
            return job_id
        match read_envelope(message).content():
            case {"id": job_id} | [_, {"sealed": {"job_id": job_id}}, *_] if is_job_id(job_id):
                return job_id
    return None
