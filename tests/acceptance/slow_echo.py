"""Included in a worker, this has it take long to load what is the echo in the end."""

import time
from typing import TYPE_CHECKING

from keye.config.settings import Settings
from keye.worker.daemon.bootsteps import EngineStep
from tests.support.echo_worker import EchoStep

if TYPE_CHECKING:
    from keye.worker.loading.served_model import ServedModel

LOAD_SECONDS = 14


def load(step: EchoStep, settings: Settings) -> "ServedModel":
    time.sleep(LOAD_SECONDS)
    return EchoStep.load(step, settings)


EngineStep.load = load  # type: ignore[assignment, method-assign]
