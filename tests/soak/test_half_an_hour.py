"""Half an hour of mixed jobs for two hosts, with a fault a minute: what is lost, what grows, who is woken.

Host `a` is hurt in ways only that it must outlive, so its memory tells of the whole time; `b` dies again and again.
"""

import random
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Self

import psutil
import pytest
from pydantic import SecretStr

from keye.config.codes import ErrorCode
from keye.config.job import AnalysisJob, ImagePart, Priority, VideoPart
from keye.config.settings import Settings
from keye.config.topology import message_list
from keye.producer import Client
from keye.worker.demo.errands import Errand, draw_errands
from tests.acceptance.conftest import Start
from tests.chaos.broker import Broker
from tests.chaos.ledger import assert_each_ended_once, assert_nothing_is_left
from tests.soak.fleet import Host, Store
from tests.soak.traffic import ANY_ANSWER, Traffic
from tests.support.conditions import eventually
from tests.support.damage import make_good_files, spoil
from tests.support.prometheus import Prometheus
from tests.support.scale import LONG, SCALE

MINUTES = 30
MINUTE = 60.0
JOBS_PER_SECOND = 8
LEASE_SECONDS = 30.0
# From which on all has happened once that a worker keeps something of: kernels, connections, decoders, the cache.
WARM_MINUTE = 6
MAX_GROWTH = 0.03
DAMAGED = (ErrorCode.MEDIA_UNSUPPORTED, ErrorCode.MEDIA_TOO_LARGE, ANY_ANSWER)


class Faults:
    """What happens in which minute. Each makes sure that it has happened."""

    def __init__(self, broker: Broker, store: Store, a: Host, b: Host, traffic: Traffic, damaged: list[Errand]) -> None:
        self._broker = broker
        self._store = store
        self._a, self._b = a, b
        self._traffic = traffic
        self._damaged = damaged
        self._frozen: psutil.Process | None = None
        self.by_minute: dict[int, Callable[[], None]] = {
            1: self._worker_dies,
            2: self._store_goes_away,
            3: self._worker_dies,
            4: self._connections_break,
            5: self._store_is_back,
            6: self._decoders_die,
            7: self._worker_freezes,
            8: self._files_are_damaged,
            9: self._worker_thaws,
            10: self._broker_stands_still,
            11: self._worker_dies,
            12: self._broker_dies,
            13: self._decoders_die,
            14: self._broker_is_back,
            15: self._worker_is_replaced,
            16: self._host_dies,
            17: self._callers_cancel,
            18: self._deadlines_pass,
            19: self._messages_are_lost,
            20: self._strangers_write,
            21: self._files_are_damaged,
            22: self._messages_are_doubled,
            23: self._host_is_back,
            24: self._worker_dies,
            25: self._connections_break,
            26: self._worker_dies,
            27: self._messages_are_lost,
            28: self._decoders_die,
            29: self._strangers_write,
        }

    def _worker_dies(self) -> None:
        worker = self._b.worker
        worker.kill()
        worker.wait()

    def _store_goes_away(self) -> None:
        self._traffic.store_is_away = True
        # Those that are on their way to it get there.
        time.sleep(MINUTE / 6)
        self._store.go_away()

    def _store_is_back(self) -> None:
        self._store.come_back()
        self._traffic.store_is_away = False

    def _connections_break(self) -> None:
        assert self._broker.redis.client_kill_filter(_type="normal", skipme=True) > 10

    def _decoders_die(self) -> None:
        for host in (self._a, self._b):
            decoders = host.worker.children()
            assert decoders
            for decoder in decoders:
                with suppress(psutil.NoSuchProcess):
                    decoder.kill()

    def _worker_freezes(self) -> None:
        worker = self._frozen = self._b.worker
        worker.suspend()
        eventually(lambda: worker.status() == psutil.STATUS_STOPPED)

    def _worker_thaws(self) -> None:
        assert self._frozen is not None
        self._frozen.resume()

    def _files_are_damaged(self) -> None:
        for errand in self._damaged:
            self._traffic.send(errand, DAMAGED)

    def _broker_stands_still(self) -> None:
        server = psutil.Process(self._broker.redis.info("server")["process_id"])
        server.suspend()
        time.sleep(MINUTE / 6)
        server.resume()

    def _broker_dies(self) -> None:
        self._broker.kill()

    def _broker_is_back(self) -> None:
        self._broker.start_again()

    def _messages_are_lost(self) -> None:
        self._traffic.burst(200, priority=Priority.LOW)
        assert self._broker.redis.lpop(message_list(Priority.LOW), 50)

    def _messages_are_doubled(self) -> None:
        self._traffic.burst(200, priority=Priority.LOW)
        messages = self._broker.redis.lrange(message_list(Priority.LOW), 0, 49)
        self._broker.redis.lpush(message_list(Priority.LOW), *messages)

    def _worker_is_replaced(self) -> None:
        self._b.end()
        self._b.begin()

    def _host_dies(self) -> None:
        self._b.kill()

    def _host_is_back(self) -> None:
        self._b.begin()

    def _callers_cancel(self) -> None:
        for job in self._traffic.burst(100, ErrorCode.CANCELLED):
            job.cancel()

    def _deadlines_pass(self) -> None:
        self._traffic.burst(200, ErrorCode.DEADLINE_EXCEEDED, deadline_seconds=1.0)

    def _strangers_write(self) -> None:
        draw = random.Random(0)
        for priority in Priority:
            self._broker.redis.lpush(message_list(priority), *(draw.randbytes(60) for _ in range(20)))


def woken(a: Host, b: Host) -> set[tuple[str, str]]:
    """The alerts that those faults should raise, and for whom; "" is for all."""
    return {
        ("KeyeJobsFail", ""),
        ("KeyeWorkerRestarts", b.address),
        ("KeyeWorkerHung", b.address),
        ("KeyeRedisDown", a.address),
        ("KeyeRedisDown", b.address),
        ("KeyeTargetDown", b.address),
        ("KeyeQuarantineGrows", ""),
    }


class Scales(threading.Thread):
    """Weighs a host every few seconds: (minutes since the start, bytes)."""

    def __init__(self, host: Host) -> None:
        super().__init__(name="scales")
        self._host = host
        self._is_over = threading.Event()
        self._began_at = time.monotonic()
        self.weights: list[tuple[float, int]] = []

    def run(self) -> None:
        while not self._is_over.wait(MINUTE / 20):
            self.weights.append(((time.monotonic() - self._began_at) / MINUTE, self._host.memory_bytes()))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self.join()

    def median(self, since: int, until: int) -> float:
        return statistics.median(weight for minute, weight in self.weights if since <= minute < until)


def chart(title: str, values: list[float]) -> str:
    """As docs/benchmarks.md shows it."""
    line = ", ".join(f"{value:.0f}" for value in values)
    axes = f'    x-axis "minute" 1 --> {len(values)}\n    y-axis 0 --> {max(values) * 1.1:.0f}'
    return f'```mermaid\nxychart-beta\n    title "{title}"\n{axes}\n    line [{line}]\n```'


@pytest.mark.timeout(2 * MINUTES * MINUTE)
@pytest.mark.skipif(SCALE is not LONG, reason="takes half an hour: make soak")
def test_half_an_hour_with_a_fault_a_minute(start: Start, broker: Broker, tmp_path: Path) -> None:
    store = Store()
    errands = draw_errands(tmp_path, store.upload)
    # Of the kinds that come from a store as many as of all others.
    in_store = [errand for errand in errands if errand.job.media[0].uri.startswith("s3:")]
    errands += in_store * (len(errands) // len(in_store) - 1)
    damaged = []
    for name, content in spoil(make_good_files(tmp_path), 52, seed=0):
        (tmp_path / name).write_bytes(content)
        part = (ImagePart if "picture" in name else VideoPart)(uri=str(tmp_path / name))
        damaged.append(Errand(name, AnalysisJob(media=(part,), prompt="?"), ErrorCode.MEDIA_CORRUPT, None))
    settings = {"KEYE_REDIS_URL": broker.url, "KEYE_S3_ENDPOINT_URL": store.url, "OMP_NUM_THREADS": "1"}
    a, b = (Host(start, tmp_path / name, KEYE_LEASE_SECONDS=str(LEASE_SECONDS), **settings) for name in "ab")
    with (
        closing(Prometheus(tmp_path, a.port, b.port)) as prometheus,
        Client(Settings(redis_url=SecretStr(broker.url), lease_seconds=LEASE_SECONDS)) as client,
    ):
        eventually(prometheus.is_up)
        eventually(lambda: prometheus.values('sum(keye_worker_state{state="ready"})') == ["2"], within_seconds=120)
        with Traffic(client, errands, JOBS_PER_SECOND) as traffic, Scales(a) as scales:
            faults = Faults(broker, store, a, b, traffic, damaged)
            began_at = time.monotonic()
            for minute in range(1, MINUTES + 1):
                time.sleep(max(0.0, began_at + minute * MINUTE - time.monotonic()))
                if befall := faults.by_minute.get(minute):
                    befall()
        now = time.time()
        ways, wrong = traffic.ends(timeout=180)
        fired = prometheus.get("query", query='max_over_time(ALERTS{alertstate="firing"}[1h])')["result"]
        names = {(alert["metric"]["alertname"], alert["metric"].get("instance", "")) for alert in fired}
        before, after = scales.median(WARM_MINUTE, WARM_MINUTE + 4), scales.median(MINUTES - 4, MINUTES)
        by_minute = [scales.median(minute, minute + 1) / 2**20 for minute in range(MINUTES)]
        steps = {"start": str(now - MINUTES * MINUTE + MINUTE), "end": str(now), "step": str(MINUTE)}
        increase = f"sum(increase(keye_jobs_total[{MINUTE:.0f}s]))"
        (ended,) = prometheus.get("query_range", query=increase, **steps)["result"]

        print(f"\n{len(traffic.sent)} jobs: {dict(ways)}; {len(wrong)} of them wrongly")
        print(f"memory of {a.address}: {before / 2**20:.0f} MiB, {after / before - 1:+.1%}; alerts: {sorted(names)}")
        print(chart("Jobs that ended in each minute", [float(value) for _, value in ended["values"]]))
        print(chart("MiB of the host that outlived it all", by_minute))
        assert wrong == []
        assert_each_ended_once(broker.redis, [sent.job for sent in traffic.sent])
        assert_nothing_is_left(client, broker.redis, LEASE_SECONDS)
        assert names == woken(a, b)
        assert after / before < 1 + MAX_GROWTH
