"""What waits, what runs, who is there, and how long it will take: of the whole fleet, as Redis has it."""

import json
from collections.abc import Iterator
from typing import Any

from redis import Redis

from keye.config import keys
from keye.config.contract import Report, escaped
from keye.config.job import Priority
from keye.config.presence import EngineUse, Presence, WorkerState, list_present
from keye.config.scripts import load_script

LOOKED_AT = 1000
"""Jobs of each queue whose kind is looked at; the others are taken to be like them."""


_STARVED_OF = {
    "fetch": "media",
    "decode": "decoders",
    "memory": "memory for pixels",
    "company": "jobs whose worker died once",
}


class QueueStatus(Report):
    priority: str
    depth: int
    oldest_seconds: float


class FleetStatus(Report):
    """`work_seconds` is how long one worker would be busy with all that waits and the rest of what runs, by what jobs
    of their kinds took; None where none has been measured yet. Divided by those that are ready it is `drain_seconds`.
    """

    queues: tuple[QueueStatus, ...]
    running: int
    dead_letters: int
    quarantined_messages: int
    workers: tuple[Presence, ...]
    work_seconds: float | None
    drain_seconds: float | None

    def lines(self) -> Iterator[str]:
        """For a terminal."""
        yield from self.load_lines()
        for present in self.workers:
            yield from worker_lines(present)
        if not self.workers:
            yield f"{'worker':<8}none"

    def load_lines(self) -> Iterator[str]:
        """What there is to do, without who does it."""
        for queue in self.queues:
            since = f", the oldest for {queue.oldest_seconds:.0f} s" if queue.depth else ""
            yield f"{queue.priority:<8}{queue.depth} queued{since}"
        yield f"{'running':<8}{self.running}"
        if self.work_seconds is None:
            yield f"{'work':<8}not known before some jobs have been answered"
        else:
            drain = "no worker is ready" if self.drain_seconds is None else f"done in about {self.drain_seconds:.0f} s"
            yield f"{'work':<8}{self.work_seconds:.0f} s of one worker, {drain}"
        yield f"{'failed':<8}{self.dead_letters} (keye dead list)"
        if self.quarantined_messages:
            yield f"{'unread':<8}{self.quarantined_messages} messages (keye dead list --messages)"


def worker_lines(present: Presence) -> Iterator[str]:
    model = "" if present.model is None else f", {present.model.name} in {present.model.precision}"
    yield escaped(f"{'worker':<8}{present.worker.name} {present.state} on {present.worker.device}{model}")
    if present.engine is not None:
        yield f"{'':<8}{engine_use(present.engine)}"
    if present.sickness:
        yield f"{'':<8}{escaped(present.sickness)}"
    yield from (f"{'':<8}{escaped(warning)}" for warning in present.warnings)


def engine_use(engine: EngineUse) -> str:
    told = f"{engine.running} of {engine.max_running} sequences run"
    if engine.num_kv_blocks:
        told += f", {engine.kv_blocks_used / engine.num_kv_blocks:.0%} of the KV cache is used"
    most_first = sorted(engine.starved_seconds, key=lambda item: -item[1])
    waited = [f"{seconds:.0f} s for {_STARVED_OF[cause]}" for cause, seconds in most_first if seconds >= 1]
    return told + (f"; of {engine.seconds:.0f} s the engine waited {', '.join(waited)}" if waited else "")


def read_status(redis: Redis) -> FleetStatus:
    """Two round trips, and as many as it takes to find the workers. Raises Redis' fault."""
    queued = [keys.queued(priority) for priority in Priority]
    names = [keys.LEASES, keys.WORK, keys.DEAD_LETTERS, keys.QUARANTINE, keys.KEPT, keys.record(""), *queued]
    said = json.loads(load_script(redis, "status")(names, [LOOKED_AT]))
    workers = tuple(list_present(redis))
    num_ready = sum(worker.state is WorkerState.READY for worker in workers)
    work = _work(said, max(1, num_ready))
    return FleetStatus(
        queues=tuple(
            QueueStatus(priority=priority, depth=queue["depth"], oldest_seconds=queue["oldest"])
            for priority, queue in zip(Priority, said["queues"], strict=True)
        ),
        running=round(said["running"]),
        dead_letters=said["dead"],
        quarantined_messages=said["quarantined"],
        workers=workers,
        work_seconds=work,
        drain_seconds=None if work is None or not num_ready else work / num_ready,
    )


def _work(said: dict[str, Any], num_workers: int) -> float | None:
    sums = {kind: tuple(map(float, written.split())) for kind, written in dict(said["work"]).items()}
    weights, seconds = (sum(column) for column in zip(*sums.values(), strict=True)) if sums else (0.0, 0.0)
    if not weights:
        return None

    def mean(kind: str) -> float:
        own_weights, own_seconds = sums.get(kind, (0.0, 0.0))
        return own_seconds / own_weights if own_weights else seconds / weights

    total = 0.0
    for queue in said["queues"]:
        # Lua writes an empty table as a list.
        kinds = dict(queue["kinds"])
        if looked_at := sum(kinds.values()):
            total += queue["depth"] / looked_at * sum(num * mean(kind) for kind, num in kinds.items())
    runs = said["runs"]
    for kind, lasted in runs:
        # It has shared its worker with as many as run now.
        total += max(0.0, mean(kind) - lasted * num_workers / max(num_workers, len(runs))) * said["running"] / len(runs)
    return total
