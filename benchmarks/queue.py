"""What a job costs beside its model: an engine that echoes, against a plain Celery app that returns as much at once."""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import cast

from redis import Redis

from keye.config import keys
from keye.config.connection import connect
from keye.config.job import AnalysisJob
from keye.config.presence import WorkerState, list_present
from keye.config.topology import UNACKED, result_key
from keye.config.wire import seal
from keye.producer import Client, Job
from keye.worker.demo.embedded_valkey import EmbeddedValkey

ROUNDS = 5
NUM_JOBS = 3000
NUM_MONITORED = 300
NUM_ASKED_ALONE = 200
MEMORY_STEP = 10_000
NUM_WORKERS = (1, 2, 4, 8)
SCALING_CONCURRENCY, SCALING_SECONDS = 4, 6

QUESTION = AnalysisJob(prompt="Hello")
ECHO, PLAIN = "tests.support.echo_worker", "benchmarks.plain_celery"
SILENT = ("--without-gossip", "--without-mingle", "--without-heartbeat")


def run() -> str:
    with tempfile.TemporaryDirectory() as name, EmbeddedValkey() as broker, Client(broker.url) as client:
        redis = connect(broker.url)
        yard = Yard(broker.url, redis, Path(name))
        with yard.worker(ECHO) as worker:
            alone = _seconds_alone(client)
            with yard.worker(PLAIN) as plain_worker:
                pairs = [
                    # In turns: a machine that others share is not as quick a minute later.
                    (
                        _round(worker, redis, lambda: _submit(client)),
                        _round(plain_worker, redis, lambda: _send_plain(broker.url)),
                    )
                    for _ in range(ROUNDS)
                ]
            of_clients, in_scripts = _commands(worker, redis, broker.url, client)
            memory = _memory(worker, redis, client)
        scaling = {num: _scaled(yard, client, num) for num in NUM_WORKERS}
    return _report(alone, pairs, of_clients, in_scripts, memory, scaling)


class Worker:
    """A Celery worker of one process. Frozen, it leaves a queue to grow."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._proc = Path(f"/proc/{process.pid}")

    @contextmanager
    def frozen(self) -> Iterator[None]:
        self._process.send_signal(signal.SIGSTOP)
        yield
        self._process.send_signal(signal.SIGCONT)

    @property
    def cpu_seconds(self) -> float:
        fields = (self._proc / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def resident_mib(self) -> float:
        return int((self._proc / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


class Yard:
    """Starts workers, and waits until they are ready; they end with their context."""

    def __init__(self, url: str, redis: Redis, folder: Path) -> None:
        self.redis = redis
        self._folder = folder
        self._environment = {"KEYE_DECODERS": "1", **os.environ, "KEYE_REDIS_URL": url}
        self._environment["KEYE_CACHE_FOLDER"] = str(folder / "cache")

    @contextmanager
    def worker(self, app: str, concurrency: int | None = 8, **environ: str) -> Iterator[Worker]:
        num_before = self._num_ready()
        command = [sys.executable, "-m", "celery", "-A", app, "worker", "--pool", "threads", *SILENT]
        command += ["--loglevel", "WARNING"]
        if concurrency is not None:
            command += ["--concurrency", str(concurrency)]
        with (self._folder / "log").open("ab") as log:
            process = subprocess.Popen(command, env=self._environment | environ, stdout=log, stderr=subprocess.STDOUT)
        try:
            if app == ECHO:
                _wait_until(lambda: self._num_ready() > num_before)
            yield Worker(process)
        finally:
            process.terminate()
            process.wait()

    def _num_ready(self) -> int:
        return sum(presence.state is WorkerState.READY for presence in list_present(self.redis))


def _submit(client: Client, num_jobs: int = NUM_JOBS, job: AnalysisJob = QUESTION) -> list[str]:
    return [cast(Job, answer).id for answer in client.submit_many([job] * num_jobs)]


def _send_plain(url: str) -> list[str]:
    os.environ["KEYE_REDIS_URL"] = url
    from benchmarks.plain_celery import analyze

    sealed = seal(QUESTION).model_dump(mode="json")
    return [analyze.apply_async(kwargs={"sealed": sealed}).id for _ in range(NUM_JOBS)]


@dataclass(frozen=True, slots=True)
class Round:
    """Rates are jobs a second, the others CPU milliseconds a job; `server_ms` is Redis' from submission to ack."""

    rate: float
    worker_ms: float
    server_ms: float
    sent_rate: float


def _round(worker: Worker, redis: Redis, send: Callable[[], list[str]]) -> Round:
    """What a worker does that finds a full queue."""
    server_before = _server_cpu_seconds(redis)
    with worker.frozen():
        began = time.perf_counter()
        job_ids = send()
        sent_rate = len(job_ids) / (time.perf_counter() - began)
        cpu_before = worker.cpu_seconds
    ends = ends_of(redis, job_ids)
    worker_ms = 1000 * (worker.cpu_seconds - cpu_before) / len(job_ids)
    server_ms = 1000 * (_server_cpu_seconds(redis) - server_before) / len(job_ids)
    return Round(steady_rate(ends), worker_ms, server_ms, sent_rate)


def _server_cpu_seconds(redis: Redis) -> float:
    used = redis.info("cpu")
    return float(used["used_cpu_user"]) + float(used["used_cpu_sys"])


def ends_of(redis: Redis, task_ids: Sequence[str]) -> list[float]:
    """When each task was done, by its Celery result, which both sides write; waits for the last."""
    names = [result_key(task_id) for task_id in task_ids]
    _wait_until(lambda: redis.exists(*names) == len(names), seconds=300, pause=0.5)
    results = (json.loads(text) for i in range(0, len(names), 500) for text in redis.mget(names[i : i + 500]))
    return sorted(datetime.fromisoformat(result["date_done"]).timestamp() for result in results)


def steady_rate(ends: Sequence[float]) -> float:
    """Of the middle eight tenths: neither the start nor the last stragglers."""
    first, last = len(ends) // 10, len(ends) * 9 // 10
    return (last - first) / (ends[last] - ends[first])


def _median(rounds: Iterable[Round]) -> Round:
    return Round(*(statistics.median(column) for column in zip(*map(astuple, rounds), strict=True)))


def _seconds_alone(client: Client) -> list[float]:
    """From `submit` to the answer in hand, one job at a time."""
    seconds = []
    for _ in range(NUM_ASKED_ALONE):
        began = time.perf_counter()
        client.submit(QUESTION).result(timeout=30)
        seconds.append(time.perf_counter() - began)
    return seconds[NUM_ASKED_ALONE // 10 :]


def _commands(worker: Worker, redis: Redis, url: str, client: Client) -> tuple[float, float]:
    """Redis commands a job from its submission to its end, by MONITOR: what clients send, and what scripts run."""
    with worker.frozen():
        counted = subprocess.Popen(
            [sys.executable, "-c", COUNT_COMMANDS, url], stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True
        )
        assert counted.stdout is not None
        counted.stdout.readline()
        job_ids = [client.submit(QUESTION).id for _ in range(NUM_MONITORED)]
    _wait_until(lambda: not redis.exists(UNACKED) and redis.hget(keys.record(job_ids[-1]), "outcome") is not None)
    redis.echo("over")
    told, _ = counted.communicate()
    of_clients, in_scripts = map(int, told.split())
    return of_clients / NUM_MONITORED, in_scripts / NUM_MONITORED


COUNT_COMMANDS = """
import sys
from redis import Redis
counts = {True: 0, False: 0}
with Redis.from_url(sys.argv[1]).monitor() as monitor:
    print("listening", flush=True)
    for command in monitor.listen():
        if command["command"] == "ECHO over":
            break
        counts[command["client_type"] == "lua"] += 1
print(counts[False], counts[True])
"""


def _memory(worker: Worker, redis: Redis, client: Client) -> list[float]:
    """Resident MiB after each of three times `MEMORY_STEP` jobs; the first is the warm-up."""
    resident = []
    for _ in range(3):
        ends_of(redis, _submit(client, MEMORY_STEP))
        resident.append(worker.resident_mib)
    return resident


def _scaled(yard: Yard, client: Client, num_workers: int) -> float:
    """Jobs a second of so many workers, for jobs that take 100 ms of waiting."""
    per_second = num_workers * SCALING_CONCURRENCY * 10
    with ExitStack() as running:
        for _ in range(num_workers):
            running.enter_context(yard.worker(ECHO, SCALING_CONCURRENCY))
        job_ids = _submit(client, per_second * SCALING_SECONDS, AnalysisJob(prompt="wait 0.1"))
        return steady_rate(ends_of(yard.redis, job_ids))


def _wait_until(condition: Callable[[], bool], seconds: float = 60, pause: float = 0.02) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds:g} s")
        time.sleep(pause)


def _report(
    alone: Sequence[float],
    pairs: Sequence[tuple[Round, Round]],
    of_clients: float,
    in_scripts: float,
    memory: Sequence[float],
    scaling: dict[int, float],
) -> str:
    ours, plain = map(_median, zip(*pairs, strict=True))
    ratio = statistics.median(mine.rate / other.rate for mine, other in pairs)
    growth = [100 * (after / before - 1) for before, after in pairwise(memory)]
    lines = [
        f"{NUM_JOBS} queued jobs, a process of 8 threads, an engine that echoes; medians of {ROUNDS} rounds in turns.",
        "",
        "| | jobs/s | worker's CPU a job | Redis' CPU a job |",
        "|---|---|---|---|",
        f"| plain Celery, late acks, the same result | {plain.rate:.0f} | {plain.worker_ms:.2f} ms | "
        f"{plain.server_ms:.2f} ms |",
        f"| ours | {ours.rate:.0f} ({ratio:.2f} x) | {ours.worker_ms:.2f} ms | {ours.server_ms:.2f} ms |",
        "",
        "| | |",
        "|---|---|",
        f"| submit to result on an idle worker, p50 / p95 | {1000 * statistics.median(alone):.1f} / "
        f"{1000 * statistics.quantiles(alone, n=20)[-1]:.1f} ms |",
        f"| `submit_many` | {ours.sent_rate:.0f} jobs/s |",
        f"| Redis commands a job, submission to ack: sent by clients | {of_clients:.1f} |",
        f"| the same, run inside of scripts | {in_scripts:.1f} |",
        f"| the worker's memory after {MEMORY_STEP} jobs, and its growth with the next two times as many | "
        f"{memory[0]:.0f} MiB, {growth[0]:+.2f} %, {growth[1]:+.2f} % |",
        "",
        f"Jobs that wait 100 ms, {SCALING_CONCURRENCY} at a time in each worker.",
        "",
        "| workers | jobs/s | of one worker's |",
        "|---|---|---|",
        *(f"| {num} | {rate:.1f} | {rate / scaling[1]:.2f} x |" for num, rate in scaling.items()),
    ]
    return "\n".join(lines) + "\n"
