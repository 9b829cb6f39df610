"""A batch: reads its source, sends a bounded number of jobs ahead, writes down how each ended. Goes on where it was."""

import math
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from keye.config.faults import (
    InvalidBatch,
    InvalidJob,
    JobNotFound,
    JobUnreadable,
    QueueFull,
    QueueUnavailable,
    Refusal,
)
from keye.config.outcome import JobResult
from keye.config.wire import SealedJob
from keye.producer.batch.answers import Missing, answer_line, code_of, error_line
from keye.producer.batch.ends import Ends
from keye.producer.batch.lines import Ended, Row, State
from keye.producer.batch.output import Output
from keye.producer.batch.progress import BatchProgress
from keye.producer.batch.questions import LINES_AT_A_TIME, Questions
from keye.producer.batch.source import Source
from keye.producer.following import End
from keye.producer.job import Job
from keye.producer.many import CHARS_PER_ROUND_TRIP, num_chars_of, refused_as_full

if TYPE_CHECKING:
    # By way of SQLite, which not every Python has.
    from keye.producer.batch.journal import Journal
    from keye.producer.batch.report.report import WriteReport
    from keye.producer.client import Client

# Of media inside the messages of all that is in flight, in the memory of Redis.
MAX_CHARS_IN_FLIGHT = 256 * 2**20
# Of the jobs that wait or run for one batch: enough for dozens of GPUs.
MAX_IN_FLIGHT = 4096
WAIT_SECONDS = 0.25
# How often it is asked whether anybody is there to answer.
WORKER_SECONDS = 3.0
STOP_SECONDS = 5.0
# For its thumbnails, and for reading all that was written.
REPORT_SECONDS = 60.0
# How long Redis may be away or refuse, and how often it is asked.
OUTAGE_SECONDS, PAUSE_SECONDS = 600.0, 1.0


# Fields of a job by which somebody asks for it to be kept.
_KEPT_BY = {"result_ttl_seconds", "idempotency_key"}


class Flight(NamedTuple):
    """The lines that a job answers: two may have one idempotency key. `num_chars` of media are inside its message."""

    rows: list[Row]
    num_chars: int
    # Nobody asked for it to be kept.
    is_lean: bool


class Batch:
    """Runs in a thread of its own from `start` on, until every line has ended, or `stop`."""

    def __init__(
        self,
        client: "Client",
        source: Source,
        journal: "Journal",
        outputs: tuple[Output, Output],
        defaults: Mapping[str, Any],
        max_in_flight: int,
        report: "WriteReport | None",
    ) -> None:
        """`outputs` take the answers, and the errors. `defaults` are fields of a job that its line need not say."""
        self._client = client
        self._source = source
        self._journal = journal
        self._output, self._errors = outputs
        self._max_in_flight = max_in_flight
        self._report = report
        self._questions = Questions(client, source, journal, defaults)
        counts = journal.counts()
        self._num_answered, self._num_failed = counts[State.ANSWERED], counts[State.FAILED]
        self._in_flight: dict[str, Flight] = {}
        self._chars_in_flight = 0
        self._ends = Ends(client, self._in_flight.keys())
        self._has_more = True
        # Sealed, and to be sent before others are; not before `_send_at`.
        self._unsent: deque[tuple[Row, SealedJob | Refusal]] = deque()
        self._send_at = -math.inf
        self._away_since = math.inf
        self._trouble = ""
        self._has_worker = True
        self._worker_asked_at = -math.inf
        self._ended_before: int | None = None
        self._must_stop = threading.Event()
        self._done: Future[BatchProgress] = Future()
        self._thread = threading.Thread(target=self._run, name="keye-batch", daemon=True)

    def start(self) -> None:
        self._done.set_running_or_notify_cancel()
        self._thread.start()

    @property
    def errors_path(self) -> Path:
        """Of the file that has what failed, once something has."""
        return self._errors.path

    @property
    def progress(self) -> BatchProgress:
        return BatchProgress(
            lines=self._questions.num_lines,
            answered=self._num_answered,
            failed=self._num_failed,
            in_flight=len(self._in_flight),
            share=self._source.share(),
            is_read=self._questions.is_read,
            trouble=self._trouble,
            has_worker=self._has_worker,
            ended_before=self._ended_before,
            passed_over=self._source.num_passed_over,
        )

    @property
    def done(self) -> Future[BatchProgress]:
        """Of the last progress, once all lines have ended or it was stopped; or of what has ended it."""
        return self._done

    def wait(self, timeout: float | None = None) -> BatchProgress:
        """Until it is `done`. Raises `TimeoutError` after so long, what has ended it, and `InvalidBatch` in a fork."""
        if not (self._thread.is_alive() or self._done.done()):
            raise InvalidBatch("This process was forked from the one that runs this batch. Wait there.")
        return self._done.result(timeout)

    def stop(self) -> None:
        """Send no more. What was sent goes on, and how it ends is there for whoever goes on with this batch."""
        if not self._must_stop.is_set():
            self._must_stop.set()
            self._ends.wake()
            # It may be waiting for a server or a store that says nothing; but for a report, it loses nothing by ending.
            self._thread.join(STOP_SECONDS if self._report is None else STOP_SECONDS + REPORT_SECONDS)

    def _run(self) -> None:
        try:
            with ExitStack() as ending:
                for each in (self._source, self._journal, self._output, self._errors, self._ends):
                    ending.callback(each.close)
                self._take_up(self._journal.unended())
                self._ended_before = self.progress.ended
                to_send = self._questions.sealed()
                while not self._must_stop.is_set() and (self._has_more or self._unsent or self._in_flight):
                    self._round(to_send)
                self._trouble = self._reported()
                progress = self.progress
        except BaseException as error:
            self._done.set_exception(error)
        else:
            self._done.set_result(progress)

    def _reported(self) -> str:
        """Why there is no report, which changes nothing about the answers; else ""."""
        try:
            if self._report is not None:
                self._trouble = "its report is being written"
                self._report(self.progress, self._journal, (self._output.path, self._errors.path), self._questions.read)
        except InvalidBatch as fault:
            return str(fault)
        return ""

    def _take_up(self, rows: list[Row]) -> None:
        """What was sent before: written down where it has ended, and else waited for."""
        while rows and not self._must_stop.is_set():
            by_id = defaultdict(list)
            for row in rows[:LINES_AT_A_TIME]:
                by_id[self._journal.job_id(row)].append(row)
            try:
                ends = dict(self._ends.look(by_id))
                ended = [(row, job_id, self._how(row, end)) for job_id, end in ends.items() for row in by_id[job_id]]
            except QueueUnavailable as fault:
                self._sit_out(fault)
                continue
            del rows[:LINES_AT_A_TIME]
            # As the journal has them, so that they come from there once, whatever becomes of them when they are sent.
            to_send = [
                row._replace(state=State.UNSENT, owner=None) for row, _, end in ended if _was_never_sent(row, end)
            ]
            unsent = {row.number for row in to_send}
            sent = [
                row._replace(state=State.SENT) for each in by_id.values() for row in each if row.number not in unsent
            ]
            self._journal.mark_sent([*sent, *to_send])
            for row in sent:
                asked = self._questions.read(row)
                is_lean = not isinstance(asked, InvalidJob) and not asked.keys() & _KEPT_BY
                self._launch(row, self._journal.job_id(row), Flight([], 0, is_lean))
            self._write(each for each in ended if each[0].number not in unsent)

    def _how(self, row: Row, end: End) -> End | Missing:
        if not isinstance(end, JobNotFound):
            return end
        asked, kept_seconds = self._questions.read(row), self._client.kept_seconds()
        own = None if isinstance(asked, InvalidJob) else asked.get("result_ttl_seconds")
        if own is not None and math.isfinite(kept_seconds):
            # Text, in a table.
            kept_seconds = float(own)
        return Missing(time.time() - row.sent_at, kept_seconds)

    def _round(self, to_send: Iterator[tuple[Row, SealedJob | Refusal]]) -> None:
        """Both, whatever comes of the first: a Redis that is full takes jobs again once answers are out of it."""
        is_sent, faults = False, []
        try:
            is_sent = self._send(to_send)
        except QueueUnavailable as fault:
            faults.append(fault)
        try:
            for ends in self._ends.wait(0 if is_sent else WAIT_SECONDS):
                ended = [(row, each, self._how(row, end)) for each, end in ends for row in self._in_flight[each].rows]
                self._write(ended)
                if ends:
                    self._has_worker, self._worker_asked_at = True, time.monotonic()
                    # There is room in a full queue again.
                    self._send_at = min(self._send_at, time.monotonic() + PAUSE_SECONDS)
            self._look_for_a_worker()
        except QueueUnavailable as fault:
            faults.append(fault)
        if faults:
            self._sit_out(faults[0])
        else:
            self._away_since = math.inf
            if not self._unsent:
                self._trouble = ""

    def _look_for_a_worker(self) -> None:
        """Now and then, while none is heard of."""
        if self._in_flight and time.monotonic() >= self._worker_asked_at + WORKER_SECONDS:
            self._worker_asked_at = time.monotonic()
            with suppress(JobNotFound, JobUnreadable):
                self._has_worker = self._client.job(next(iter(self._in_flight))).progress.has_worker

    def _send(self, to_send: Iterator[tuple[Row, SealedJob | Refusal]]) -> bool:
        """Whether some were."""
        if time.monotonic() < self._send_at or self._chars_in_flight > MAX_CHARS_IN_FLIGHT:
            return False
        batch: list[tuple[Row, SealedJob | Refusal]] = []
        num_chars = 0
        most = min(LINES_AT_A_TIME, self._max_in_flight - len(self._in_flight))
        while len(batch) < most and num_chars < CHARS_PER_ROUND_TRIP and not self._must_stop.is_set():
            sealed = self._unsent.popleft() if self._unsent else next(to_send, None)
            if sealed is None:
                self._has_more = False
                break
            row, job = sealed
            batch.append((row._replace(state=State.SENDING, sent_at=time.time()), job))
            num_chars += num_chars_of(job)
        if not batch:
            return False
        self._journal.mark_sending(row for row, sealed in batch if isinstance(sealed, SealedJob))
        # What has failed under an idempotency key would be answered by that failure.
        answers = self._client.send([each for _, each in batch], retry_failed=any(row.run for row, _ in batch))
        return self._take_answers(batch, answers)

    def _take_answers(self, batch: list[tuple[Row, SealedJob | Refusal]], answers: list[Job | Refusal]) -> bool:
        sent, not_taken, refused, again, trouble = [], [], [], [], ""
        for (row, sealed), answer in zip(batch, answers, strict=True):
            if isinstance(answer, QueueFull | QueueUnavailable):
                if isinstance(answer, QueueFull):
                    not_taken.append(row._replace(state=State.UNSENT))
                again.append((row, sealed))
                trouble = str(answer)
            elif isinstance(answer, Refusal):
                refused.append((row, self._journal.job_id(row), answer))
            else:
                assert isinstance(sealed, SealedJob)
                if answer.id != sealed.job_id:
                    # That had its idempotency key before.
                    row = row._replace(owner=answer.id)
                    self._ends.suspect(answer.id)
                sent.append(row := row._replace(state=State.SENT))
                is_lean = all(getattr(sealed.job, name) is None for name in _KEPT_BY)
                self._launch(row, answer.id, Flight([], num_chars_of(sealed), is_lean))
        self._trouble = trouble
        self._journal.mark_sent([*sent, *not_taken])
        self._write(refused)
        self._unsent.extendleft(reversed(again))
        if full := refused_as_full(answers):
            self._send_at = time.monotonic() + min(full.values())
        if away := [answer for answer in answers if isinstance(answer, QueueUnavailable)]:
            raise away[0]
        return bool(sent)

    def _launch(self, row: Row, job_id: str, flight: Flight) -> None:
        """Its job is queued, or was by whoever ran this batch before."""
        if job_id not in self._in_flight:
            self._in_flight[job_id] = flight
            self._chars_in_flight += flight.num_chars
        # Else by an idempotency key.
        self._in_flight[job_id].rows.append(row)

    def _write(self, ended: Iterable[tuple[Row, str, End | Missing]]) -> None:
        """On the disk, and then let go of."""
        answers, errors, ends, now = [], [], [], time.time()
        job_ids, answered = set(), set()
        for row, job_id, end in ended:
            job_ids.add(job_id)
            if isinstance(end, JobResult):
                answered.add(job_id)
                answers.append(answer_line(row, end, now))
                ends.append(Ended(row.number, now, end.timings.queued + end.timings.total))
            else:
                errors.append(error_line(row, job_id, end))
                ends.append(Ended(row.number, now, code=code_of(end)))
        if not ends:
            return
        self._output.add(answers)
        self._errors.add(errors)
        self._journal.end(ends, self._output.written, self._errors.written)
        self._num_answered += len(answers)
        self._num_failed += len(errors)
        flown = {job_id: self._in_flight.pop(job_id) for job_id in job_ids if job_id in self._in_flight}
        self._chars_in_flight -= sum(flight.num_chars for flight in flown.values())
        with suppress(QueueUnavailable):
            # What failed is a dead letter, which somebody may look at.
            self._client.let_go(job_id for job_id, flight in flown.items() if flight.is_lean and job_id in answered)

    def _sit_out(self, fault: QueueUnavailable) -> None:
        now = time.monotonic()
        self._away_since = min(self._away_since, now)
        if now - self._away_since > OUTAGE_SECONDS:
            raise fault.with_traceback(None)
        self._trouble = str(fault)
        self._must_stop.wait(PAUSE_SECONDS)


def _was_never_sent(row: Row, end: End | Missing) -> bool:
    """Or it ran in a process that kept how it ended for itself, and has gone with that."""
    return isinstance(end, Missing) and end.is_lost and (row.state is State.SENDING or math.isinf(end.kept_seconds))
