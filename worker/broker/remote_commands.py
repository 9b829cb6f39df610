"""Celery's remote commands: who looks is answered, `revoke` cancels a job, and nobody changes a worker by the queue."""

import logging
from collections.abc import Callable
from typing import Any

from celery.worker.control import Panel, control_command
from pydantic import Field

from config.job_id import is_job_id
from worker.broker.envelope import Foreign, Name, read_envelope, validated

log = logging.getLogger(__name__)

# With the names that older clients know them by.
READING = {
    *("ping", "stats", "active", "dump_active", "reserved", "dump_reserved", "scheduled", "dump_schedule"),
    *("registered", "dump_tasks", "active_queues", "query_task", "revoked", "dump_revoked", "conf", "dump_conf"),
    *("clock", "report"),
}
# Sent by any worker that starts beside this one, and by Flower all the time.
COURTESIES = {"hello", "enable_events"}
REPLIES = "reply.celery.pidbox"


class _ReplyTo(Foreign):
    """Of Celery's own exchange: any other could be a list of somebody's."""

    exchange: str = Field(pattern=f"^{REPLIES}$")
    routing_key: Name


class _Command(Foreign):
    method: Name
    arguments: dict[str, Any] | None = None
    destination: list[Name] | None = None
    pattern: Name | None = None
    matcher: Name | None = None
    reply_to: _ReplyTo | None = None


class _Headers(Foreign):
    clock: int | None = None


def read_command(message: Any) -> None:
    """Raises `Unreadable` for a broadcast that Celery could stumble over."""
    envelope = read_envelope(message)
    validated(_Headers, envelope.headers, "headers")
    validated(_Command, envelope.content(), "body")


def guard_commands(cancel: Callable[[str], None], allows_changes: bool) -> None:
    """For this process; `cancel` ends the job of a Celery task, or sees to it that it will not run."""
    if not allows_changes:
        for name in Panel.data.keys() - READING:
            control_command(name=name)(_refusal(name))

    def revoke(state: Any, task_id: str | list[str], **_: Any) -> dict[str, str]:
        ids = [each for each in (task_id if isinstance(task_id, list) else [task_id]) if is_job_id(each)]
        for each in ids:
            cancel(each)
        return {"ok": f"{len(ids)} jobs are cancelled, or will be"}

    # Celery's own would have the message thrown away, and the job with it.
    control_command(name="revoke")(revoke)
    control_command(name="terminate")(lambda state, signal=None, task_id=(), **_: revoke(state, task_id))


def _refusal(name: str) -> Callable[..., dict[str, str]]:
    def refuse(state: Any, **_: Any) -> dict[str, str]:
        log.log(logging.DEBUG if name in COURTESIES else logging.WARNING, "the remote command %s is refused", name)
        return {"error": f"{name} changes a worker; KEYE_CELERY_CONTROL=1 allows it"}

    return refuse
