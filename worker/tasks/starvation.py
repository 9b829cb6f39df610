"""How long the engine could have taken another sequence while jobs here were not prepared yet, and what kept them."""

import time
from collections.abc import Callable, Sequence
from typing import Literal, get_args

from keye.config.presence import EngineUse, StarvedSeconds
from keye.worker.engine.snapshot import EngineSnapshot
from keye.worker.periodic_thread import PeriodicThread
from keye.worker.tasks.attempt import Phase
from keye.worker.telemetry import metrics

Cause = Literal["fetch", "decode", "memory", "company"]

# A sample: which parts of a second jobs of a few milliseconds take comes out right on average.
LOOK_SECONDS = 0.1

# The first that a job is at names the narrowest place. Who waits for something shows that there is not enough of it;
# one that is decoded does not, where others are still fetched: more of them on their way would fill the decoders.
_CAUSES: dict[Phase, Cause] = {
    "decoder": "decode",
    "memory": "memory",
    "fetch": "fetch",
    "decode": "decode",
    "company": "company",
}


class Starvation(PeriodicThread):
    """Looks at engine and jobs from `start` to `stop`; nothing is counted where no job is here, nor where the engine is
    full. `seconds` are by cause.
    """

    def __init__(self, snapshot: Callable[[], EngineSnapshot], phases: Callable[[], Sequence[Phase]]) -> None:
        super().__init__("starvation", LOOK_SECONDS)
        self.seconds: dict[Cause, float] = dict.fromkeys(get_args(Cause), 0.0)
        for cause in self.seconds:
            # Before the first second, so that dashboards know them.
            metrics.STARVED_SECONDS.labels(cause)
        self._snapshot = snapshot
        self._phases = phases
        self._began_at = self._looked_at = time.monotonic()

    def turn(self) -> None:
        looked_at, self._looked_at = self._looked_at, time.monotonic()
        phases = self._phases()
        cause = next((cause for phase, cause in _CAUSES.items() if phase in phases), None)
        # What has just been handed in is taken in at the next step.
        if cause is not None and self._snapshot().has_room(phases.count("engine") + 1):
            self.seconds[cause] += self._looked_at - looked_at
            metrics.STARVED_SECONDS.labels(cause).inc(self._looked_at - looked_at)

    def told(self) -> EngineUse:
        now = self._snapshot()
        return EngineUse(
            running=now.running,
            max_running=now.max_running,
            seconds=round(time.monotonic() - self._began_at, 1),
            starved_seconds=StarvedSeconds(**{cause: round(seconds, 1) for cause, seconds in self.seconds.items()}),
            kv_blocks_used=now.blocks_used,
            num_kv_blocks=now.num_blocks,
        )
