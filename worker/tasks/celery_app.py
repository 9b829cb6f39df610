"""The Celery app of a worker; `celery -A keye.worker.tasks.celery_app worker` starts it without our supervisor."""

from ssl import CERT_REQUIRED

from celery import Celery

from keye.config.connection import connect
from keye.config.settings import Settings
from keye.config.topology import celery_options
from keye.worker.broker.admission import Admission, Quarantine
from keye.worker.broker.transport import SCHEME
from keye.worker.telemetry import tell_warnings


def build_app(settings: Settings) -> Celery:
    """An app that consumes jobs; what answers them is put on it, as `analyst`, before it starts to.

    Messages pass its `quarantine`'s door first, see `keye.worker.broker`.
    """
    url = settings.redis_url.get_secret_value()
    app = Celery("keye", include=["keye.worker.tasks.analyze"])
    redis = connect(url)
    app.quarantine = Quarantine(redis)
    # A message outlives its worker exactly as the job's lease does; one that comes back early is not worked on.
    app.conf.update(celery_options(url, settings.result_ttl_seconds, visibility_timeout_seconds=settings.lease_seconds))
    app.conf.update(
        broker_transport=SCHEME,
        broker_transport_options={
            **app.conf.broker_transport_options,
            "admission": Admission(redis, app.quarantine, settings.celery_canvas),
            # Whatever steps a Celery client knows, its messages are in one of these.
            "priority_steps": list(range(10)),
        },
        # kombu knows a scheme only of transports of its own.
        broker_use_ssl={"ssl_cert_reqs": CERT_REQUIRED} if url.startswith("rediss://") else None,
        worker_pool="threads",
        worker_concurrency=settings.concurrency,
        worker_consumer="keye.worker.tasks.quiet_consumer:QuietConsumer",
        worker_send_task_events=settings.celery_events,
    )
    return app


# Before anything is loaded that may warn of something.
tell_warnings()
celery_app = build_app(Settings())
# By name: the daemon imports this room, never the other way round.
celery_app.steps["worker"].add("keye.worker.daemon.bootsteps:EngineStep")
