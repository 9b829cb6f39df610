"""The Celery app of a worker; `celery -A keye.worker.tasks.celery_app worker` starts it without our supervisor."""

import sys
from functools import partial
from typing import Any

from celery import Celery
from celery.signals import celeryd_init, setup_logging

from keye.config.connection import HEALTH_CHECK_SECONDS, connect
from keye.config.redis_url import RedisUrl
from keye.config.settings import Settings
from keye.config.topology import QUEUE, UNACKED, UNACKED_INDEX, UNACKED_MUTEX
from keye.worker.broker.admission import Admission, Quarantine
from keye.worker.broker.transport import SCHEME, ResultBackend
from keye.worker.telemetry import metrics, tell_warnings
from keye.worker.telemetry.log import set_up_log
from keye.worker.telemetry.standard_streams import wait_for_no_reader


def build_app(settings: Settings) -> Celery:
    """An app that consumes jobs; what answers them is put on it, as `analyst`, before it starts to.

    Messages pass its `admission` first, and lie in its `quarantine` if they cannot be read: see `keye.worker.broker`.
    Timeouts and health checks are set on every connection: without them a half-open one leaves a worker deaf for as
    long as the operating system keeps the socket.
    """
    url = settings.full_redis_url()
    app = Celery("keye", include=["keye.worker.tasks.analyze"])
    redis = connect(url, key_prefix=settings.key_prefix)
    app.quarantine = Quarantine(redis)
    app.admission = Admission(redis, app.quarantine, settings.celery_canvas)
    redis_url = RedisUrl.read(url)
    app.conf.update(
        broker_url=redis_url.shown,
        broker_transport=SCHEME,
        broker_transport_options={
            "admission": app.admission,
            # Whatever steps a Celery client knows, its messages are in one of these.
            "priority_steps": list(range(10)),
            "queue_order_strategy": "priority",
            # A message outlives its worker exactly as the job's lease does; one that comes back early is not worked on.
            "visibility_timeout": settings.lease_seconds,
            "unacked_key": UNACKED,
            "unacked_index_key": UNACKED_INDEX,
            "unacked_mutex_key": UNACKED_MUTEX,
            "unacked_restore_interval": 1,
            "unacked_restore_throttle": 1,
            "unacked_mutex_expire": 10,
            "redis_url": redis_url,
            "global_keyprefix": settings.key_prefix,
            "health_check_interval": HEALTH_CHECK_SECONDS,
        },
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        # A server that is full or misses its replicas answers with errors, which else end the worker.
        broker_channel_error_retry=True,
        result_backend=f"{ResultBackend.__module__}:{ResultBackend.__name__}",
        result_backend_transport_options={"global_keyprefix": settings.key_prefix},
        result_expires=settings.result_ttl_seconds,
        task_default_queue=QUEUE,
        task_serializer="json",
        result_serializer="json",
        accept_content=["json"],
        task_acks_late=True,
        task_track_started=False,
        worker_pool="threads",
        worker_concurrency=settings.num_slots,
        worker_prefetch_multiplier=1,
        # A lost connection does not end a job: its lease goes on, and its outcome is settled without Celery.
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_consumer="keye.worker.tasks.quiet_consumer:QuietConsumer",
        # Ours are leases, events and metrics; Celery's chatter costs connections and fans out with every worker.
        worker_send_task_events=settings.celery_events,
        task_send_sent_event=False,
    )
    # Before Celery warns of what it finds; of its commands only a worker comes by there.
    celeryd_init.connect(_begin_worker, dispatch_uid="keye")
    setup_logging.connect(partial(_log_as_set, app, settings), weak=False, dispatch_uid="keye")
    return app


def _begin_worker(**_: Any) -> None:
    wait_for_no_reader()


def _log_as_set(app: Celery, settings: Settings, loglevel: int, logfile: str | None, **_: Any) -> None:
    """Called by Celery in place of what it would do itself."""
    set_up_log(settings, metrics.WORKER or "worker", loglevel, logfile)
    # What libraries print. Celery says in a signal handler that it ends, where a full pipe would hold up the worker.
    app.log.redirect_stdouts(app.conf.worker_redirect_stdouts_level)
    sys.__stdout__ = sys.stdout  # type: ignore[misc, assignment]


# Before anything is loaded that may warn of something.
tell_warnings()
celery_app = build_app(Settings.read())
# By name: the daemon imports this room, never the other way round.
celery_app.steps["worker"].add("keye.worker.daemon.bootsteps:EngineStep")
