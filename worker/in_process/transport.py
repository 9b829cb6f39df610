"""A client's transport whose jobs run in this process: who is next, a thread each, and how it ended."""

import logging
import os
import threading
import time
from contextlib import suppress
from heapq import heappop, heappush
from itertools import count
from pathlib import Path

from keye.config import keys
from keye.config.codes import ErrorCode, JobState
from keye.config.faults import Fault, JobNotFound
from keye.config.job import AnalysisJob, Priority
from keye.config.outcome import JobFailure, JobResult
from keye.config.wire import JobOutline, SealedJob
from keye.producer.job import Job
from keye.producer.memory import MemoryTransport
from keye.worker.host_fault import host_fault_of
from keye.worker.leases.claims import Claimed
from keye.worker.results.event_writer import EventWriter
from keye.worker.tasks.attempt import Attempt
from keye.worker.tasks.fault import explain, failure_of
from keye.worker.tasks.lookahead import Lookahead
from keye.worker.tasks.workbench import Workbench

# Jobs that have ended, of which results, events and ids can still be read; more than a client has ahead of its reader.
MAX_ENDED = 10_000

log = logging.getLogger(__name__)


class InProcessTransport(MemoryTransport):
    """Begins with a job as soon as decoders and engine can have it, the most urgent first; each has one attempt.

    Media in `folder` are removed with their jobs.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(self._queue, max_ended=MAX_ENDED)
        self._folder = folder
        self._pid = os.getpid()
        # Guards all that follows. Whoever reads waits for it, too: what is for the starter wakes all.
        self._changed = threading.Condition()
        self._is_closed = False
        self._queued: list[tuple[int, int, SealedJob]] = []
        self._numbers = count()
        self._running: dict[str, tuple[Attempt, threading.Thread]] = {}

    def start(self, bench: Workbench) -> None:
        """Take jobs, and work on them with this."""
        bench.lookahead.wake = self._wake
        # A thread of its own: a Ctrl-C that meets who submits must not leave a job half begun.
        self._starter = threading.Thread(target=self._begin_jobs, args=(bench,), name="job-starter", daemon=True)
        self._starter.start()

    def close(self) -> None:
        """Take no more, cancel all there is, and return once it has ended."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._starter.join()
        for _, _, sealed in self._queued:
            # Else it was cancelled before, and is forgotten.
            with suppress(JobNotFound):
                Job(sealed.job_id, self).cancel()
        running = list(self._running.values())
        for attempt, _ in running:
            attempt.interrupt("cancelled")
        for _, thread in running:
            thread.join()
        super().close()

    def cancel(self, job_id: str, job: JobOutline, outcome_json: str) -> str | None:
        state = super().cancel(job_id, job, outcome_json)
        with self._changed:
            if state == JobState.RUNNING and job_id in self._running:
                self._running[job_id][0].interrupt("cancelled")
        return state

    def _queue(self, sealed: SealedJob) -> None:
        if self._pid != os.getpid():
            raise RuntimeError("The analyzer was made before this process was forked. Make another one here.")
        with self._changed:
            if self._is_closed:
                raise RuntimeError("The analyzer is closed. Make another one.")
            heappush(self._queued, (list(Priority).index(sealed.job.priority), next(self._numbers), sealed))
            self._changed.notify_all()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _begin_jobs(self, bench: Workbench) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._is_closed or (self._queued and bench.lookahead.has_room(len(self._running)))
                )
                if self._is_closed:
                    return
                _, _, sealed = heappop(self._queued)
                lease = _lease_of(sealed)
                try:
                    started = {"attempts": str(lease.attempt), "claimed_at": str(lease.claimed_at)}
                    self.move(sealed.job_id, JobState.RUNNING, started)
                except (ValueError, JobNotFound):  # it was cancelled, and may be forgotten
                    self._remove_media(sealed.job)
                    continue
                attempt = Attempt(bench, sealed.job, lease)
                thread = threading.Thread(target=self._run, args=(bench.lookahead, attempt), daemon=True)
                self._running[sealed.job_id] = attempt, thread
            try:
                thread.start()
            except RuntimeError as error:  # the host starts no more threads
                self._end(attempt, error)

    def _run(self, lookahead: Lookahead, attempt: Attempt) -> None:
        with lookahead.watching(attempt):
            try:
                ended: JobResult | BaseException = attempt.run()
            except BaseException as error:
                ended = error
        self._end(attempt, ended)

    def _end(self, attempt: Attempt, ended: JobResult | BaseException) -> None:
        job_id = attempt.lease.job_id
        outcome = ended if isinstance(ended, JobResult) else _failure_of(ended, attempt)
        self._remove_media(attempt.job)
        for event_json in attempt.events.unwritten:
            self.add(keys.events(job_id), {"event": event_json})
        with self._changed:
            self.end(job_id, outcome.state, outcome.model_dump_json())
            del self._running[job_id]
            self._changed.notify_all()

    def _remove_media(self, job: AnalysisJob) -> None:
        for path in (Path(part.uri) for part in job.all_media()):
            if path.parent == self._folder:
                path.unlink(missing_ok=True)


class InProcessEvents(EventWriter):
    """What attempts say, to who reads it in this process."""

    def __init__(self, transport: MemoryTransport) -> None:
        self._transport = transport

    def write(self, lease: Claimed, events: list[str]) -> bool:
        for event_json in events:
            self._transport.add(keys.events(lease.job_id), {"event": event_json})
        return True

    def write_waits(self, lease: Claimed, waits: bool) -> None:
        """No other worker could begin with the job."""


def _lease_of(sealed: SealedJob) -> Claimed:
    deadline = sealed.job.deadline_seconds
    return Claimed(
        job_id=sealed.job_id,
        token="",
        attempt=1,
        max_attempts=1,
        claimed_at=time.time(),
        submitted_at=sealed.submitted_at,
        deadline_at=None if deadline is None else sealed.submitted_at + deadline,
        idempotency_key=None,
    )


def _failure_of(error: BaseException, attempt: Attempt) -> JobFailure:
    host_fault = host_fault_of(error)
    # Who asks is told all of it: it is his host.
    fault = explain(error) if host_fault is None else Fault(ErrorCode.HOST_FAULT, str(host_fault))
    if fault.code is ErrorCode.INTERNAL:
        log.error("job %s: a fault in stage %s", attempt.lease.job_id, attempt.stage, exc_info=error)
    return failure_of(fault, attempt.stage, attempt.lease, attempt.job.metadata)
