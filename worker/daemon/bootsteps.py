"""Puts the engine, the leases and our presence into a Celery worker's life. What a job does lives in `tasks`."""

import gc
import logging
import os
import socket
from contextlib import ExitStack, suppress
from functools import cache, partial
from threading import Barrier, Timer
from typing import TYPE_CHECKING, Any

from celery import bootsteps
from celery.concurrency.thread import TaskPool as ThreadPool
from celery.signals import worker_ready, worker_shutting_down
from celery.worker import state
from redis.exceptions import RedisError

from keye.config.connection import connect
from keye.config.faults import JobNotFound, QueueUnavailable
from keye.config.outcome import WorkerIdentity
from keye.config.presence import Presence, WorkerState
from keye.config.primary import ServerUnusable
from keye.config.settings import Settings
from keye.producer.client import Client
from keye.worker.broker.remote_commands import guard_commands
from keye.worker.daemon.broker_watch import BrokerWatch
from keye.worker.daemon.exit_codes import ExitCode
from keye.worker.daemon.findings import Severity, as_message, fault, select
from keye.worker.daemon.host_limits import raise_open_files
from keye.worker.daemon.preflight import check_celery, check_transport
from keye.worker.daemon.vitals import Vitals
from keye.worker.daemon.watch import Watch, limit_load
from keye.worker.engine.step_plan import StepLimits
from keye.worker.leases.job_lease import LeaseStore
from keye.worker.leases.reaper import Reaper
from keye.worker.leases.renewal import CancelListener, LeaseRenewal
from keye.worker.loading.before_torch import secure_torch
from keye.worker.media.decode.sandbox import hide_memory
from keye.worker.media.job_media import DecoderPool
from keye.worker.results.event_writer import EventWriter
from keye.worker.results.outbox import Outbox, Spool
from keye.worker.results.settlement import Settlement
from keye.worker.tasks.analyze import Analyst
from keye.worker.tasks.fitness import Fitness
from keye.worker.tasks.probe import probe
from keye.worker.tasks.starvation import Starvation
from keye.worker.tasks.stragglers import dead_letter, expire
from keye.worker.tasks.work_clock import WorkClock
from keye.worker.tasks.workbench import Workbench
from keye.worker.telemetry.health import HEARTBEAT_VARIABLE, Health, Heartbeat
from keye.worker.telemetry.log import flush_log
from keye.worker.telemetry.presence import Announcer

if TYPE_CHECKING:
    from keye.worker.loading.served_model import ServedModel

# Celery looks for a shutdown only when its loop turns; a quiet one would sleep for up to ten seconds.
TURN_SECONDS = 0.25
# For threads to start, on a machine under load.
START_SECONDS = 60.0

logger = logging.getLogger(__name__)


class EngineStep(bootsteps.StartStopStep):
    """Loads the model and makes the analyst before the consumer, always the last step, takes the first message.

    Ends the process with its own `ExitCode` when the pool is not threads, Celery's options are unsafe, the model cannot
    be loaded, or something hangs or dies later (`Watch`).
    """

    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        if not issubclass(worker.pool_cls, ThreadPool):
            logger.critical(
                "The pool %s cannot be used: one model and one engine serve all jobs of a process. "
                "Start Celery with --pool threads.",
                worker.pool_cls.__module__,
            )
            raise SystemExit(ExitCode.WRONG_POOL)
        # Here too: an app of the operator's own may have changed what the supervisor found right.
        conf = worker.app.conf
        findings = [*check_celery(conf, os.environ), *check_transport(conf)]
        if worker.autoscale:
            # Celery's own attempt to add a thread ends the worker at its second job.
            cure = "Leave it out: a worker takes as many jobs as its engine runs, KEYE_CONCURRENCY at most."
            findings.append(fault("Celery", "--autoscale is set, and the threads pool neither grows nor shrinks", cure))
        if faults := select(findings, Severity.FAULT):
            logger.critical(as_message(faults))
            raise SystemExit(ExitCode.PREFLIGHT_FAILED)
        self._is_shutting_down = False
        worker_shutting_down.connect(self._end_at_second_signal)

    def start(self, worker: Any) -> None:
        # Celery's own line about an ended task holds the whole answer, which is not for logs; `tasks` has one without.
        logging.getLogger("celery.app.trace").setLevel(logging.WARNING)
        raise_open_files()
        hide_memory()
        settings = Settings()
        redis = connect(settings.full_redis_url(), key_prefix=settings.key_prefix)
        try:
            redis.ping()
        except ServerUnusable as refusal:
            logger.critical("%s", refusal)
            raise SystemExit(ExitCode.PREFLIGHT_FAILED) from None
        except RedisError:
            pass  # it is waited for
        identity = WorkerIdentity(host=socket.gethostname(), pid=os.getpid(), device=settings.device)
        kept = {"result": settings.result_ttl_seconds, "dead_letter": settings.dead_letter_ttl_seconds}
        self._announcer = Announcer(redis, Presence(worker=identity, state=WorkerState.LOADING), worker.hostname, kept)
        self._announcer.start()
        durable = settings.require_durable
        self._broker_watch = BrokerWatch(redis, settings.lease_seconds, durable, self._announcer.warn)
        self._broker_watch.start()
        self._heartbeat = Heartbeat(os.environ.get(HEARTBEAT_VARIABLE))
        self._heartbeat.beat()
        leases = LeaseStore(redis, settings.lease_seconds)
        settlement = Settlement(redis, settings.result_ttl_seconds, settings.dead_letter_ttl_seconds)
        spool = Spool.of(redis, settings.spool_folder)
        spool.make()
        self._outbox = outbox = Outbox(settlement, spool, leases.patience)
        # Before the model: what the process before this one could not write should not wait until it is read.
        waiting = (outbox.deliver, worker.app.quarantine.deliver)
        self._reaper = Reaper(
            leases, identity.name, waiting, partial(dead_letter, settlement), partial(expire, settlement)
        )
        self._reaper.start()
        # Before the model, too: the children come up while it is read.
        self._decoders = DecoderPool.of(settings)
        self._decoders.start()
        # Where one hangs that lets no other run, only the hundred youngest threads are told of: those of the pool are
        # older than the engine's, and younger than the main one, which reads the model.
        self._start_pool = cache(partial(_start_threads, worker.pool))
        load_limit = limit_load(settings.load_seconds)
        try:
            served = self.load(settings)
            self._start_pool()
            # Celery itself looks for a SIGTERM only once it consumes.
            state.maybe_shutdown()
        except SystemExit:
            # Celery stops no step before all have started.
            self._announcer.stop()
            raise
        # A million objects of torch and the model live as long as we do: without this every full collection, between
        # two steps or at the very end, walks over them for a second.
        gc.collect()
        gc.freeze()

        identity = identity.model_copy(update={"device": served.device})
        self._engine = served.engine
        self._drain_seconds = settings.drain_seconds
        self._renewal = LeaseRenewal(leases)
        self._cancels = CancelListener(redis, self._renewal.hurry)
        bench = Workbench.of(
            settings,
            inbox=served.engine.inbox,
            processor=served.processor,
            sampling=served.sampling,
            model=served.model,
            decoders=self._decoders,
            events=EventWriter(redis),
            worker=identity,
        )
        self._lookahead = lookahead = bench.lookahead
        work = WorkClock(redis, min(settings.num_slots, StepLimits().max_running))
        worker.app.admission.has_room = lookahead.has_room
        self._fitness = fitness = Fitness(partial(probe, bench), worker.app.admission, self._tell_fitness)
        fitness.start()
        self._analyst = analyst = worker.app.analyst = Analyst(
            *(bench, leases, self._renewal, settlement, outbox, work, fitness)
        )
        self._client = Client(settings)
        guard_commands(self._cancel, settings.celery_control)
        self._watch = Watch(served.engine, settings.step_seconds, analyst.stragglers, self._renewal, self._heartbeat)
        load_limit.cancel()
        self._watch.start()
        self._vitals = Vitals(served.engine, served.model, self._decoders, bench.media_cache, work)
        self._vitals.start()
        self._starvation = Starvation(served.engine.snapshot, lookahead.phases)
        self._starvation.start()
        self._announcer.engine_use = self._starvation.told
        self._renewal.start()
        self._cancels.start()
        self._ready = Presence(
            worker=identity,
            state=WorkerState.READY,
            model=served.model,
            max_tokens=served.engine.inbox.max_tokens,
            template_tokens=served.processor.template_tokens,
            warnings=served.warnings,
        )
        worker_ready.connect(self._announce_ready)

    def load(self, settings: Settings) -> "ServedModel":
        """Raises `SystemExit` where there is nothing to serve."""
        secure_torch(settings.cache_folder)
        # Imported here, not above: it takes seconds, and a wrong pool should be told at once.
        from keye.worker.loading.served_model import load_served_model
        from keye.worker.model.load import CheckpointFault

        try:
            return load_served_model(settings, self._start_pool)
        except Exception as error:
            logger.critical("The model cannot be served: %s", error, exc_info=not isinstance(error, CheckpointFault))
            raise SystemExit(ExitCode.MODEL_LOAD_FAILED) from None

    def register_with_event_loop(self, worker: Any, hub: Any) -> None:
        """Called by Celery for each connection to the broker, whose loss clears the loop's timers."""
        # Any call turns the loop, and with each turn kombu asks whether the door takes more.
        self._lookahead.wake = partial(hub.call_soon, bool)
        hub.call_repeatedly(TURN_SECONDS, state.maybe_shutdown)

    def close(self, worker: Any) -> None:
        """Called by Celery before any step stops."""
        self._say(self._ready.model_copy(update={"state": WorkerState.DRAINING}))

    def stop(self, worker: Any) -> None:
        """Called by Celery once the consumer takes no more messages."""
        with ExitStack() as ending:
            # From last to first: whatever fails, the rest is stopped too. A drain may outlast a lease: renew until the
            # last job has ended.
            last = (self._client.close, self._announcer.stop, self._outbox.close, self._reaper.stop, self._renewal.stop)
            eyes = (
                self._fitness.stop,
                self._cancels.stop,
                self._watch.stop,
                self._vitals.stop,
                self._starvation.stop,
                self._broker_watch.stop,
            )
            for stop in (*last, *eyes, self._engine.stop, self._decoders.stop):
                ending.callback(stop)
            time_is_up = Timer(self._drain_seconds, self._renewal.drain)
            time_is_up.daemon = True
            try:
                time_is_up.start()
            except RuntimeError:  # the host starts no more threads
                self._renewal.drain()
            ending.callback(time_is_up.cancel)
            # The pool's threads wait for the engine. Celery stops the pool only after us, so it is done here.
            worker.pool.stop()

    def terminate(self, worker: Any) -> None:
        """A cold shutdown abandons nothing: running jobs end with the process, and their leases after it."""

    def _end_at_second_signal(self, **_: Any) -> None:
        """Called by Celery as it handles a signal; by itself it would go on with the drain."""
        if self._is_shutting_down:
            flush_log()
            os._exit(ExitCode.FORCED)
        self._is_shutting_down = True

    def _cancel(self, task_id: str) -> None:
        """Called by Celery for each task that is revoked, by whoever may publish to Redis."""
        try:
            # Twice: it may come between a look and the note that it is to be cancelled when it comes.
            for _ in range(2):
                with suppress(JobNotFound):
                    self._client.find(self._analyst.job_of(task_id)).cancel()
                    return
                self._analyst.revoke(task_id)
        except QueueUnavailable as fault:
            logger.warning("job %s: revoked, and cannot be cancelled: %s", task_id, fault)

    def _announce_ready(self, **_: Any) -> None:
        self._say(self._ready)

    def _tell_fitness(self, sickness: str) -> None:
        told = {"state": WorkerState.SICK, "sickness": sickness} if sickness else {}
        if not self._is_shutting_down:
            self._say(self._ready.model_copy(update=told))

    def _say(self, presence: Presence) -> None:
        """To this host, and to all of Redis: a supervisor that is told to stop kills whoever only loads."""
        self._heartbeat.state = Health(presence.state)
        self._heartbeat.beat()
        self._announcer.announce(presence)


def _start_threads(pool: ThreadPool) -> None:
    """All at once, and not one with each job: Celery's loop would end of a thread that its host cannot start."""
    have_all_started = Barrier(pool.limit)
    for future in [pool.executor.submit(have_all_started.wait, START_SECONDS) for _ in range(pool.limit)]:
        future.result()
