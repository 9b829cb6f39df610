"""How jobs travel through Celery: the task's name, the queue, priorities, and what a message looks like."""

import json
import secrets
from base64 import b64encode
from typing import Any

from keye.config.job import Priority, is_job_id
from keye.config.keys import PREFIX

ANALYZE_TASK = "keye.analyze"
QUEUE = "keye.jobs"

# The header, true, of a message whose job's record was there before it: should that be gone, the job has ended.
RECORDED = "keye_recorded"

# Celery's Redis transport keeps one list per step and reads them in this order: the lowest number first.
PRIORITY_STEPS = {Priority.HIGH: 0, Priority.NORMAL: 3, Priority.LOW: 6}

# The Redis hash of what workers have taken and not acknowledged, as kombu writes it: JSON of message, exchange, queue.
# Under names of our own: whoever shares kombu's has their messages handed out again after the shortest visibility
# timeout of all, which is ours.
UNACKED = f"{PREFIX}unacked"
# The sorted set of their delivery tags, by when they were taken.
UNACKED_INDEX = f"{PREFIX}unacked-index"
# String, whose turn it is to hand those out again that were taken too long ago.
UNACKED_MUTEX = f"{PREFIX}unacked-mutex"
# What kombu calls the first two, for all Celery apps of a database. Workers of 0.2 have their messages there.
SHARED_UNACKED, SHARED_UNACKED_INDEX = "unacked", "unacked_index"


# The Redis set of who hears Celery's remote commands, as kombu names it and, without the worker's name in it, a member.
LISTENERS = "_kombu.binding.celery.pidbox"
LISTENER = ("\x06\x16\x06\x16", ".celery.pidbox")


def result_key(task_id: str) -> str:
    """String that Celery's Redis backend reads a task's result from, and the channel on which it waits for it."""
    return f"celery-task-meta-{task_id}"


def message_list(priority: Priority) -> str:
    """The Redis list that Celery keeps the messages of this priority in, as kombu names it."""
    step = PRIORITY_STEPS[priority]
    return f"{QUEUE}\x06\x16{step}" if step else QUEUE


def message_lists() -> list[str]:
    """All lists that Celery clients put messages for our queue into, whatever priority steps they know: 0 first."""
    return [QUEUE, *(f"{QUEUE}\x06\x16{step}" for step in range(1, 10))]


def job_named_by(message: Any) -> str | None:
    """The id of the job that a message, any decoded JSON, is for; protocol 1 has it among the properties only."""
    if not isinstance(message, dict):
        return None
    places = ((message.get("headers"), "id"), (message.get("properties"), "correlation_id"))
    named = (part.get(name) for part, name in places if isinstance(part, dict))
    return next(filter(is_job_id, named), None)


def message(job_id: str, sealed_json: str | None, priority: Priority) -> str:
    """What lies in that list for one delivery of a job that has a record: its `SealedJob`, None for what is there."""
    # As `body_of` has it, without reading and writing the job once more.
    body = f'[[], {{"sealed": {sealed_json or "null"}}}, {{}}]'
    return message_around(body, job_id, PRIORITY_STEPS[priority], is_recorded=True)


def body_of(arguments: dict[str, Any]) -> str:
    """What a message says to our task: these keyword arguments, and nothing to be called afterwards."""
    return json.dumps([[], arguments, {}])


def message_around(body: str, task_id: str, step: int, is_recorded: bool) -> str:
    """A message with this body, for the list of this priority step.

    Task protocol 2 in the envelope of kombu's virtual transports; `docs/producers.md` has it for other languages.
    """
    return json.dumps(
        {
            "body": b64encode(body.encode()).decode(),
            "content-type": "application/json",
            "content-encoding": "utf-8",
            "headers": {"task": ANALYZE_TASK, "id": task_id, "lang": "py"} | ({RECORDED: True} if is_recorded else {}),
            "properties": {
                "correlation_id": task_id,
                "delivery_tag": secrets.token_hex(16),
                "delivery_mode": 2,
                "delivery_info": {"exchange": "", "routing_key": QUEUE},
                "priority": step,
                "body_encoding": "base64",
            },
        }
    )
