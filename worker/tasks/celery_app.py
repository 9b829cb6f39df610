"""The Celery app of a worker; `celery -A worker.tasks.celery_app worker` starts it without our supervisor."""

from celery import Celery

from config.settings import Settings
from config.topology import celery_options
from worker.telemetry.warning_filters import tell_warnings


def build_app(settings: Settings) -> Celery:
    """An app that consumes jobs; what answers them is put on it, as `analyst`, before it starts to."""
    app = Celery("keye", include=["worker.tasks.analyze"])
    app.conf.update(
        celery_options(
            settings.redis_url.get_secret_value(),
            settings.result_ttl_seconds,
            # A message outlives its worker exactly as the job's lease does; one that comes back early is not worked on.
            visibility_timeout_seconds=settings.lease_seconds,
        ),
        worker_pool="threads",
        worker_concurrency=settings.concurrency,
        worker_consumer="worker.tasks.quiet_consumer:QuietConsumer",
    )
    return app


# Before anything is loaded that may warn of something.
tell_warnings()
celery_app = build_app(Settings())
# By name: the daemon imports this room, never the other way round.
celery_app.steps["worker"].add("worker.daemon.bootsteps:EngineStep")
