"""One thread that ends this process where it hangs. What it cannot see, a hung process tells by not renewing leases."""

import faulthandler
import logging
import os
import threading
from typing import TYPE_CHECKING

from celery.worker import state

from worker.daemon.exit_codes import ExitCode

if TYPE_CHECKING:
    from worker.engine.step_loop import Engine

LOOK_SECONDS = 0.5
# The descriptor itself: Celery puts its log in the place of sys.stderr.
STDERR = 2

logger = logging.getLogger(__name__)


class Watch:
    """Looks at the engine twice a second, from `start` to `stop`; a drain is watched too.

    A dead engine stops the worker in Celery's way. One that hangs in a step takes the process with it: nothing else
    frees its device, and only a lease that is no longer renewed frees its jobs.
    """

    def __init__(self, engine: "Engine", step_seconds: float) -> None:
        self._engine = engine
        self._step_seconds = step_seconds
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            # Native code that keeps Python's lock keeps it from us too; this needs none.
            faulthandler.dump_traceback_later(self._step_seconds, exit=True, file=STDERR)
            if self._stopping.wait(LOOK_SECONDS):
                break
            self._look_at_engine()
        faulthandler.cancel_dump_traceback_later()

    def _look_at_engine(self) -> None:
        if not self._engine.is_alive and state.should_stop is None:
            logger.critical("The engine died; this process ends. Its jobs were told, its log above says why.")
            state.should_stop = ExitCode.ENGINE_DIED
        if (seconds := self._engine.seconds_in_step) > self._step_seconds:
            logger.critical(
                "A step of the engine has taken %.1f s, the limit is %g (KEYE_STEP_SECONDS). This process ends; "
                "its jobs start again once their leases have ended. Where each thread was:",
                *(seconds, self._step_seconds),
            )
            faulthandler.dump_traceback(file=STDERR)
            os._exit(ExitCode.STEP_HUNG)
