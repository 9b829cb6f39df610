"""Once a second: what only a look at the parts of a worker tells, as metrics."""

from importlib.metadata import version
from typing import TYPE_CHECKING

from keye.config.outcome import ModelIdentity
from keye.worker.media.job_media import DecoderPool, MediaCache
from keye.worker.periodic_thread import PeriodicThread
from keye.worker.tasks.work_clock import WorkClock
from keye.worker.telemetry import metrics
from keye.worker.telemetry.log import dropped_lines
from keye.worker.telemetry.metrics import WORKER

if TYPE_CHECKING:
    from keye.worker.engine.step_loop import Engine

LOOK_SECONDS = 1.0


class Vitals(PeriodicThread):
    """From `start` to `stop`, through a drain too. Also hands on what jobs of each kind took, for whoever plans."""

    def __init__(
        self,
        engine: "Engine",
        model: ModelIdentity,
        decoders: DecoderPool,
        cache: MediaCache,
        work: WorkClock,
    ) -> None:
        super().__init__("vitals", LOOK_SECONDS)
        self._engine = engine
        self._decoders = decoders
        self._cache = cache
        self._work = work
        self._before = engine.snapshot()
        self._num_dropped = 0
        installed = [version(package) for package in ("keye-worker", "torch", "transformers")]
        metrics.BUILD.labels(WORKER, *installed, model.name, model.precision, model.attention or "").set(1)

    def turn(self) -> None:
        now, before = self._engine.snapshot(), self._before
        self._before = now
        metrics.ENGINE_STEPS.inc(now.steps - before.steps)
        metrics.ENGINE_BUSY_SECONDS.inc(now.step_seconds - before.step_seconds)
        metrics.PREEMPTIONS.inc(now.preemptions - before.preemptions)
        metrics.OUT_OF_MEMORY.inc(now.out_of_memory - before.out_of_memory)
        num_dropped, before_that = dropped_lines(), self._num_dropped
        self._num_dropped = num_dropped
        metrics.LOG_LINES_DROPPED.inc(num_dropped - before_that)
        metrics.RUNNING.labels(WORKER).set(now.running)
        metrics.WAITING.labels(WORKER).set(now.waiting)
        metrics.STEP_TOKENS.labels(WORKER).set(now.max_step_tokens)
        metrics.KV_BLOCKS.labels(WORKER, "used").set(now.blocks_used)
        metrics.KV_BLOCKS.labels(WORKER, "free").set(now.num_blocks - now.blocks_used)
        num_busy = self._decoders.num_busy
        metrics.DECODERS.labels(WORKER, "busy").set(num_busy)
        metrics.DECODERS.labels(WORKER, "idle").set(self._decoders.num_decoders - num_busy)
        metrics.CACHE_BYTES.labels(WORKER).set(self._cache.num_bytes)
        metrics.FRAMES_CACHE_BYTES.labels(WORKER).set(self._decoders.num_cached_bytes)
        # Last: alone it needs Redis.
        self._work.hand_on()
