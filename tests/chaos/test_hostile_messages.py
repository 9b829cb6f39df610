"""Thousands of messages that nobody should send: no worker dies of one, and each good job between them is answered."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from keye.config import keys
from keye.config.codes import JobState
from keye.config.job import Priority
from keye.config.quarantine import MAX_KEPT_BYTES, QuarantinedMessage
from keye.config.topology import QUEUE, UNACKED, message_list, result_key
from keye.producer import Client, Job
from tests.chaos.broker import Broker
from tests.chaos.conftest import Gate
from tests.chaos.echo_workers import EchoWorker, EchoWorkers
from tests.chaos.hostile_messages import hostile_messages
from tests.support.conditions import eventually
from tests.support.scale import SCALE

# So few that the quarantine holds them all.
BATCH = 500
BROADCASTS = "/0.celery.pidbox"
LISTS = [QUEUE, *(f"{QUEUE}\x06\x16{step}" for step in range(1, 10))]
# Whatever else lies in Redis, somebody made a worker put it there.
OURS = ("keye:", "celery-task-meta-", "_kombu.", "unacked", QUEUE)
MAX_GROWTH = 1.1


def resident_bytes(worker: EchoWorker) -> int:
    pages = Path(f"/proc/{worker.pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.holds(
    "docs/reliability.md#the-chaos-tests",
    "2,000 (200,000) messages drawn at",
)
@pytest.mark.holds("README.md#ask-a-question", "No job ends its worker")
@pytest.mark.holds(
    "docs/design.md#decisions",
    "So `worker/broker` reads each one as bytes",
    "What cannot be read goes into quarantine.",
)
@pytest.mark.holds("docs/alerts.md#keyequarantinegrows", "workers take no harm")
@pytest.mark.timeout(7200)
def test_no_message_ends_a_worker_or_gets_lost(
    broker: Broker, client: Client, workers: EchoWorkers, gate: Gate
) -> None:
    (worker,) = workers.start_ready()
    redis = broker.redis
    sizes: list[int] = []
    num_quarantined = 0
    good: list[Job] = []

    def send_batch(number: int) -> list[tuple[bytes, str, bool]]:
        sent: list[tuple[bytes, str, bool]] = []

        @seed(number)
        @settings(
            max_examples=BATCH,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(hostile_messages())
        def send(message: tuple[bytes, str, bool]) -> None:
            raw, *_ = message
            sent.append(message)
            redis.lpush(LISTS[len(sent) % len(LISTS)], raw)
            if len(sent) % 10 == 0:
                redis.publish(BROADCASTS, raw)
            if len(sent) % 50 == 0:
                good.append(client.submit(prompt="said between them", priority=Priority.LOW))

        send()
        return sent

    for number in range(SCALE.num_hostile_messages // BATCH):
        sent = send_batch(number)
        eventually(lambda: worker.is_ready and not any(redis.llen(name) for name in LISTS), within_seconds=120)
        # Once a message behind them is taken, each of them is known to be taken.
        assert client.submit(prompt="said behind them").result(timeout=60).answer == "said behind them"
        eventually(lambda: not redis.exists(UNACKED), within_seconds=60)
        assert [job.result(timeout=60).answer for job in good] == ["said between them"] * len(good)
        good.clear()
        entries = [QuarantinedMessage.of(*entry) for entry in redis.xrange(keys.QUARANTINE)]
        redis.delete(keys.QUARANTINE)
        num_quarantined += len(entries)
        kept = {entry.raw for entry in entries}
        for raw, job_id, is_named in sent:
            state, *waiting = redis.hmget(keys.record(job_id), "state", "due_at", "left_seconds")
            # For its time, or for a worker of a release that knows its schema.
            waits = any(waiting)
            # What holds another job's id ends as that job, of which its caller hears as Celery tells it.
            has_ended = (state is not None and JobState(state).is_final) or redis.exists(result_key(job_id))
            # Its caller hears of it, and an operator where no worker could read it.
            assert has_ended or waits or not is_named, raw
            assert has_ended or waits or raw[:MAX_KEPT_BYTES] in kept, raw
        sizes.append(resident_bytes(worker))

    assert worker.exit_code(0) is None
    strange = [name for name in redis.scan_iter(count=1000) if not name.startswith(OURS)]
    assert strange == []
    assert redis.type(keys.LEASES) in ("zset", "none")
    assert all(redis.type(message_list(priority)) in ("list", "none") for priority in Priority)
    _, irregularities = client.verify()
    assert irregularities == []
    gate("hostile messages, deaths", f"{SCALE.num_hostile_messages}, {num_quarantined} quarantined, 0", "0")
    # The first batch is still new to it.
    growth = sizes[-1] / sizes[1]
    gate("its memory after all of them, by that after 1,000", f"{growth:.2f} x", f"{MAX_GROWTH} x")
    assert growth < MAX_GROWTH
