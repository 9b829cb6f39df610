"""The fleet at one moment and the jobs that run: as a report, and as a frame of text for `keye top`."""

import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence

from redis import Redis

from keye.config.contract import escaped
from keye.config.presence import EngineUse, Presence, StarvedSeconds, WorkerState
from keye.producer.progress import period
from keye.producer.records import JobSummary, longest_running
from keye.producer.status import FleetStatus, engine_use, read_status, worker_lines

MAX_JOBS = 200
"""Running jobs that are told of, more than a terminal has rows."""

_INDENT = " " * 8


class Overview(FleetStatus):
    """Also the running `jobs`, those first that have run for longest; `at` is in Unix seconds of the server's clock."""

    at: float
    jobs: tuple[JobSummary, ...]

    def frame(self, columns: int | None = None, rows: int | None = None, fault: str = "") -> list[str]:
        """Lines for a terminal of this size (None: of any): what there is to do, workers, jobs.

        `fault` is why none of it is newer.
        """
        told = (fault, *self.load_lines()) if fault else self.load_lines()
        head = [line for text in told for line in _wrapped(escaped(text), columns)]
        # Who takes no jobs first.
        present = sorted(self.workers, key=lambda each: (each.state is WorkerState.READY, each.worker.name))
        workers = [line for each in present for text in worker_lines(each) for line in _wrapped(text, columns)]
        workers = workers or [f"{'worker':<8}none"]
        jobs = list(self._job_lines())
        if rows is not None:
            room = max(0, rows - len(head))
            room_for_workers = max(room - len(jobs), room // 2)
            if len(workers) > room_for_workers:
                shorter = [*_wrapped(self._together(), columns), *map(_in_a_line, present)]
                workers = _first(room_for_workers, shorter, "worker")
            jobs = _first(room - len(workers), jobs, "job")
        return [*head, *workers, *jobs][:rows]

    def since(self, before: "Overview") -> "Overview":
        """The same, but of engines that have told of themselves since then what they waited for in between."""
        uses = {each.worker.name: each.engine for each in before.workers}
        engines = (_between(uses.get(each.worker.name), each.engine) for each in self.workers)
        workers = (e.model_copy(update={"engine": use}) for e, use in zip(self.workers, engines, strict=True))
        return self.model_copy(update={"workers": tuple(workers)})

    def _together(self) -> str:
        """All workers as if they were one."""
        counts, starved = Counter[str](), Counter[str]()
        for use in (each.engine for each in self.workers if each.engine is not None):
            counts.update(use.model_dump(exclude={"starved_seconds"}))
            starved.update(dict(use.starved_seconds))
        told = f"{'workers':<8}{len(self.workers)}"
        return (
            f"{told}, {engine_use(EngineUse(**counts, starved_seconds=StarvedSeconds(**starved)))}" if counts else told
        )

    def _job_lines(self) -> Iterator[str]:
        if self.jobs:
            yield f"{'job':<36} {'stage':<8} {'for':>4} {'tokens':>6} worker"
        for job in self.jobs:
            lasted = "?" if job.claimed_at is None else period(max(0.0, self.at - job.claimed_at))
            tokens, stage = job.num_tokens or 0, job.stage or "?"
            yield escaped(f"{job.job_id:<36} {stage:<8} {lasted:>4} {tokens:>6} {job.worker or '?'}")


def read_overview(redis: Redis) -> Overview:
    """Raises Redis' fault."""
    at, jobs = longest_running(redis, MAX_JOBS)
    return Overview(**dict(read_status(redis)), at=at, jobs=tuple(jobs))


def _between(before: EngineUse | None, now: EngineUse | None) -> EngineUse | None:
    if before is None or now is None or now.seconds <= before.seconds:
        return now
    waited = {cause: seconds - getattr(before.starved_seconds, cause) for cause, seconds in now.starved_seconds}
    return now.model_copy(update={"seconds": now.seconds - before.seconds, "starved_seconds": StarvedSeconds(**waited)})


def _wrapped(text: str, columns: int | None) -> list[str]:
    if columns is None or columns <= 2 * len(_INDENT):
        return [text]
    return textwrap.wrap(text, columns, subsequent_indent=_INDENT, break_on_hyphens=False)


def _in_a_line(present: Presence) -> str:
    engine, use = present.engine, ""
    if engine is not None:
        use = f" {engine.running}/{engine.max_running}"
        if engine.num_kv_blocks:
            use += f" KV {engine.kv_blocks_used / engine.num_kv_blocks:.0%}"
    why = f" {present.sickness}" if present.sickness else ""
    return escaped(f"{'worker':<8}{present.worker.name} {present.state}{use}{why} {present.worker.device}")


def _first(room: int, lines: Sequence[str], what: str) -> list[str]:
    """As many as there is room for, and how many more there are."""
    if len(lines) <= room:
        return list(lines)
    return [*lines[: max(0, room - 1)], f"{what:<8}and {len(lines) - max(0, room - 1):,} more"]
