"""How jobs travel through Celery: the task's name, the queue, priorities, and the options both sides share."""

import json
import secrets
from base64 import b64encode
from typing import Any

from keye.config.connection import HEALTH_CHECK_SECONDS, SOCKET_TIMEOUT_SECONDS
from keye.config.job import Priority, is_job_id

ANALYZE_TASK = "keye.analyze"
QUEUE = "keye.jobs"

# Celery's Redis transport keeps one list per step and reads them in this order: the lowest number first.
PRIORITY_STEPS = {Priority.HIGH: 0, Priority.NORMAL: 3, Priority.LOW: 6}

# The Redis hash of what workers have taken and not acknowledged, as kombu names it: JSON of message, exchange, queue.
# All Celery apps of a database share it.
UNACKED = "unacked"
# And the sorted set of their delivery tags, by when they were taken.
UNACKED_INDEX = "unacked_index"


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


def message(job_id: str, sealed: Any, priority: Priority) -> str:
    """What lies in that list for one delivery of `sealed` (the decoded JSON of a `SealedJob`)."""
    return message_around(body_of({"sealed": sealed}), job_id, PRIORITY_STEPS[priority])


def body_of(arguments: dict[str, Any]) -> str:
    """What a message says to our task: these keyword arguments, and nothing to be called afterwards."""
    return json.dumps([[], arguments, {}])


def message_around(body: str, task_id: str, step: int) -> str:
    """A message with this body, for the list of this priority step.

    Task protocol 2 in the envelope of kombu's virtual transports; `docs/producers.md` has it for other languages.
    """
    return json.dumps(
        {
            "body": b64encode(body.encode()).decode(),
            "content-type": "application/json",
            "content-encoding": "utf-8",
            "headers": {"task": ANALYZE_TASK, "id": task_id, "lang": "py"},
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


def celery_options(redis_url: str, result_ttl_seconds: int, visibility_timeout_seconds: float) -> dict[str, Any]:
    """Options of the Celery app, the same for who publishes and who consumes.

    Timeouts and health checks are set on every connection: without them a half-open connection leaves a worker deaf
    for as long as the operating system keeps the socket.
    """
    timeouts = {"socket_timeout": SOCKET_TIMEOUT_SECONDS, "socket_connect_timeout": SOCKET_TIMEOUT_SECONDS}
    return {
        "broker_url": redis_url,
        "result_backend": redis_url,
        "result_expires": result_ttl_seconds,
        "task_default_queue": QUEUE,
        "task_serializer": "json",
        "result_serializer": "json",
        "accept_content": ["json"],
        "task_acks_late": True,
        "task_track_started": False,
        "worker_prefetch_multiplier": 1,
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        # A server that is full or misses its replicas answers with errors, which else end the worker.
        "broker_channel_error_retry": True,
        # A lost connection does not end a job: its lease goes on, and its outcome is settled without Celery.
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        **{f"redis_{name}": seconds for name, seconds in timeouts.items()},
        "redis_backend_health_check_interval": HEALTH_CHECK_SECONDS,
        "broker_transport_options": {
            "priority_steps": sorted(PRIORITY_STEPS.values()),
            "queue_order_strategy": "priority",
            "visibility_timeout": visibility_timeout_seconds,
            "unacked_restore_interval": 1,
            "unacked_restore_throttle": 1,
            "unacked_mutex_expire": 10,
            **timeouts,
            "health_check_interval": HEALTH_CHECK_SECONDS,
        },
        # Ours are leases, events and metrics; Celery's chatter costs connections and fans out with every worker.
        "worker_send_task_events": False,
        "task_send_sent_event": False,
    }
