"""Included in a worker, this has its engine's next step `die`, `hang` or `freeze` as `KEYE_TEST_FAULT`'s file says."""

import ctypes
import os
import threading
from pathlib import Path

from keye.worker.engine.step_loop import Engine

FAULT = Path(os.environ["KEYE_TEST_FAULT"])
step = Engine._step


def step_or_fail(engine: Engine) -> None:
    match FAULT.read_text() if FAULT.exists() else "":
        case "die":
            raise RuntimeError("the GPU has fallen off the bus")
        case "hang":
            threading.Event().wait()
        case "freeze":  # as native code does that keeps Python's lock
            ctypes.PyDLL(None).pause()
    step(engine)


Engine._step = step_or_fail  # type: ignore[method-assign]
