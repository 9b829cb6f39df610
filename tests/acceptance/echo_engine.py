"""Included in a worker (`CELERY_WORKER_INCLUDE`), this has it serve the echo in place of a model."""

from keye.worker.daemon.bootsteps import EngineStep
from tests.support.echo_worker import EchoStep

EngineStep.load = EchoStep.load  # type: ignore[method-assign]
