"""Celery's remote commands: who looks is answered, `revoke` cancels a job, and nobody changes a worker by the queue."""

import json
import logging
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal

from celery.worker.control import Panel, control_command
from pydantic import Field

from keye.config.job import is_job_id
from keye.worker.broker.envelope import Foreign, Name, Unreadable, parse, read_envelope, validated

log = logging.getLogger(__name__)

# With the names that older clients know them by.
READING = {
    *("ping", "stats", "active", "dump_active", "reserved", "dump_reserved", "scheduled", "dump_schedule"),
    *("registered", "dump_tasks", "active_queues", "query_task", "revoked", "dump_revoked", "conf", "dump_conf"),
    *("clock", "report"),
}
# Sent by any worker that starts beside this one, and by Flower all the time.
COURTESIES = {"hello", "enable_events"}
# Room to revoke a few thousand tasks.
MAX_COMMAND_BYTES = 2**18
# Celery logs them where it knows no such command or argument.
Identifier = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]{1,64}$")]


class _ReplyTo(Foreign):
    """Of Celery's own exchange: any other could be a list of somebody's."""

    exchange: Literal["reply.celery.pidbox"]
    routing_key: Name


class _Command(Foreign):
    """Celery's other matcher takes regular expressions, of which a short one can keep a worker busy for years."""

    method: Identifier
    arguments: dict[Identifier, Any] | None = None
    destination: list[Name] | None = None
    pattern: Name | None = None
    matcher: Literal["glob"] | None = None
    reply_to: _ReplyTo | None = None
    ticket: Name | None = None


class _Headers(Foreign):
    """The worker's own clock goes on from there, and has to be written as JSON."""

    clock: Annotated[int, Field(ge=0, lt=2**63)] | None = None


def read_command(raw: bytes) -> str:
    """A broadcast as it was published, written anew. Raises `Unreadable` for one that Celery could stumble over."""
    if len(raw) > MAX_COMMAND_BYTES:
        raise Unreadable(f"it has {len(raw)} bytes, the limit is {MAX_COMMAND_BYTES}")
    envelope = read_envelope(parse(raw, "it"))
    headers = validated(_Headers, envelope.headers, "headers")
    command = validated(_Command, envelope.content(), "body").model_dump()
    body = json.dumps(command)
    if "__type__" in body:
        # kombu would make Python objects of it, and log what it cannot make one of.
        raise Unreadable("its arguments hold what kombu would take for Python objects")
    properties = {"delivery_tag": str(uuid.uuid4()), "delivery_info": {"exchange": "celery.pidbox", "routing_key": ""}}
    kind = {"content-type": "application/json", "content-encoding": "utf-8"}
    return json.dumps({"body": body, **kind, "headers": headers.model_dump(), "properties": properties})


def guard_commands(cancel: Callable[[str], None], allows_changes: bool) -> None:
    """For this process; `cancel` ends the job of a Celery task, or sees to it that it will not run."""
    if not allows_changes:
        for name in Panel.data.keys() - READING:
            control_command(name=name)(_refusal(name))

    # Each takes a round trip or two, and Celery's loop has other things to do.
    canceller = ThreadPoolExecutor(1, "revoke")

    def revoke(state: Any, task_id: str | list[str], **_: Any) -> dict[str, str]:
        ids = [each for each in (task_id if isinstance(task_id, list) else [task_id]) if is_job_id(each)]
        for each in ids:
            canceller.submit(cancel, each)
        return {"ok": f"{len(ids)} jobs are cancelled, or will be"}

    # Celery's own would have the message thrown away, and the job with it.
    control_command(name="revoke")(revoke)
    control_command(name="terminate")(lambda state, signal=None, task_id=(), **_: revoke(state, task_id))


def _refusal(name: str) -> Callable[..., dict[str, str]]:
    def refuse(state: Any, **_: Any) -> dict[str, str]:
        log.log(logging.DEBUG if name in COURTESIES else logging.WARNING, "the remote command %s is refused", name)
        return {"error": f"{name} changes a worker; KEYE_CELERY_CONTROL=1 allows it"}

    return refuse
