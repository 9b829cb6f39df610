"""/metrics, /livez and /readyz of a host, served by the supervisor from threads of their own."""

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from socketserver import ThreadingMixIn
from threading import Lock, Thread
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app, multiprocess
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from redis import Redis, RedisError

from keye.config.presence import WorkerState
from keye.producer.status import FleetStatus, read_status
from keye.worker.telemetry.health import NAME_VARIABLE, Health, HostFolder, judge
from keye.worker.telemetry.log import dropped_lines

# Of several Prometheus servers one asks Redis.
FRESH_SECONDS = 5.0
# Of each of a worker's files, taken when it is made: one that found the disk full as it grew would end its worker.
FILE_BYTES = 2**18
FILES = ("counter", "histogram", "gauge_livemax")

logger = logging.getLogger(__name__)


def environment_of(worker: str, folder: Path) -> dict[str, str]:
    """What a worker that is about to be started needs to write its metrics there; nothing where there is no room."""
    multiprocess.mark_process_dead(worker, str(folder))
    try:
        for kind in FILES:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            file = os.open(folder / f"{kind}_{worker}.db", flags, 0o600)
            try:
                os.posix_fallocate(file, 0, FILE_BYTES)
            finally:
                os.close(file)
    except OSError as error:
        logger.warning("worker %s goes without metrics: %s", worker, error)
        return {}
    return {"PROMETHEUS_MULTIPROC_DIR": str(folder), NAME_VARIABLE: worker}


class HostCollector(Collector):
    """What no worker tells of itself: how it is, how often it was started again, and the fleet as Redis has it."""

    def __init__(self, workers: Callable[[], Mapping[str, tuple[Health, int]]], redis: Redis) -> None:
        """`workers` tells of each worker of this host how it is and how often it was started again."""
        self._workers = workers
        self._redis = redis
        self._lock = Lock()
        self._status: FleetStatus | None = None
        self._read_at = float("-inf")

    def collect(self) -> Iterator[Metric]:
        workers = self._workers()
        yield _gauge(
            "worker_state",
            "1 for the state that a worker of this host is in",
            ("worker", "state"),
            {(name, state): float(state is now) for name, (now, _) in workers.items() for state in Health},
        )
        restarts = CounterMetricFamily("keye_worker_restarts", "Starts of a worker after its first", labels=["worker"])
        for name, (_, num_restarts) in workers.items():
            restarts.add_metric([name], num_restarts)
        yield restarts
        dropped = CounterMetricFamily(
            "keye_supervisor_log_lines_dropped", "Lines of the supervisor's own log that were lost"
        )
        dropped.add_metric([], dropped_lines())
        yield dropped
        status = self._fresh_status()
        yield _gauge("redis_up", "1 where Redis answers this host", (), {(): float(status is not None)})
        if status is None:
            return
        depths = {(queue.priority,): float(queue.depth) for queue in status.queues}
        yield _gauge("queue_depth", "Jobs that wait", ("priority",), depths)
        oldest = {(queue.priority,): queue.oldest_seconds for queue in status.queues}
        yield _gauge("queue_oldest_seconds", "How long the oldest of them has waited", ("priority",), oldest)
        yield _gauge("running_jobs", "Jobs that run, on all hosts", (), {(): float(status.running)})
        yield _gauge("dead_letters", "Failed jobs that are kept", (), {(): float(status.dead_letters)})
        yield _gauge(
            "quarantined_messages", "Messages that nobody could read", (), {(): float(status.quarantined_messages)}
        )
        states = [worker.state for worker in status.workers]
        num_workers = {(state,): float(states.count(state)) for state in WorkerState}
        yield _gauge("workers", "Workers of all hosts", ("state",), num_workers)
        if status.work_seconds is not None:
            what = "Seconds that one worker would take for all that waits and the rest of what runs"
            yield _gauge("work_waiting_seconds", what, (), {(): status.work_seconds})
        if status.drain_seconds is not None:
            yield _gauge("drain_seconds", "The same, by as many workers as are ready", (), {(): status.drain_seconds})

    def _fresh_status(self) -> FleetStatus | None:
        with self._lock:
            if time.monotonic() - self._read_at > FRESH_SECONDS:
                try:
                    self._status = read_status(self._redis)
                except RedisError as fault:
                    logger.debug("metrics go without what Redis holds: %s", fault)
                    self._status = None
                self._read_at = time.monotonic()
            return self._status


@contextmanager
def serving(folder: HostFolder, collector: HostCollector, host: str, port: int | None) -> Iterator[None]:
    """Answer on that address while the body runs; a port that cannot be had is told, and ends no worker."""
    if port is None:
        yield
        return
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry, str(folder.metrics))
    registry.register(collector)
    metrics = make_wsgi_app(registry)

    def answer(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == "/metrics":
            return metrics(environ, start)
        verdict = judge(folder.path)
        asked = {"/livez": verdict.is_live, "/readyz": verdict.is_ready}
        status = ("200 OK" if asked[path] else "503 Service Unavailable") if path in asked else "404 Not Found"
        start(status, [("Content-Type", "text/plain; charset=utf-8")])
        return [f"{verdict.reason}\n".encode() if path in asked else b"/metrics, /livez, /readyz\n"]

    try:
        server = make_server(host, port, answer, _Server, _Quiet)
    except (OSError, UnicodeError) as error:
        logger.error("Metrics cannot be served on %s:%d (KEYE_METRICS_PORT): %s", host, port, error)
        yield
        return
    logger.info("Metrics: http://%s:%d/metrics, and /livez, /readyz", host, port)
    Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    timeout = 10  # seconds that a caller may take for its question

    def log_message(self, *_: Any) -> None:
        """A line for each scrape helps nobody."""


def _gauge(name: str, what: str, labels: tuple[str, ...], values: Mapping[Any, float]) -> Metric:
    """`values` by the values of the labels, tuples of strings."""
    family = GaugeMetricFamily(f"keye_{name}", what, labels=labels)
    for label_values, value in values.items():
        family.add_metric(label_values, value)
    return family
