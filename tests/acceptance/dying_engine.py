"""The worker's app with an engine that dies of its next step once the file `KEYE_TEST_FAULT` exists."""

import os
from pathlib import Path

from worker.engine.step_loop import Engine
from worker.tasks.celery_app import celery_app

__all__ = ["celery_app"]

FAULT = Path(os.environ["KEYE_TEST_FAULT"])
step = Engine._step


def step_or_die(engine: Engine) -> None:
    if FAULT.exists():
        raise RuntimeError("the GPU has fallen off the bus")
    step(engine)


Engine._step = step_or_die  # type: ignore[method-assign]
