"""A client for tests of programs that ask: no Redis and no worker, and jobs that end as the test says."""

import itertools
import threading
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from redis import Redis

from keye.config import keys
from keye.config.codes import LEGAL_MOVES, UNANSWERED, ErrorCode, JobState, QueuedAgain, Stage
from keye.config.event import Event, FramesDecoded, JobEnded, StageStarted, TextGenerated
from keye.config.faults import JobNotFound, KeyeError, Refusal
from keye.config.job import AnalysisJob, Priority
from keye.config.outcome import JobFailure, JobResult, ModelIdentity, StageTimings, TokenUsage, WorkerIdentity
from keye.config.settings import ProducerSettings
from keye.config.wire import JobOutline, SealedJob
from keye.producer.async_client import AsyncJob
from keye.producer.client import Client
from keye.producer.following import BEGINNING, Entry, FeedLook, Look, order_of
from keye.producer.job import Job
from keye.producer.reader import Reader
from keye.producer.transport import MAX_PROGRESS_EVENTS, Transport, fingerprint_of

Reply = Callable[[AnalysisJob], "str | ErrorCode | None"]


class MemoryClient(Client):
    """A `Client` that keeps jobs in this process; `AsyncClient(MemoryClient())` is the same for asyncio.

    >>> client = MemoryClient(lambda job: "a cat" if job.media else ErrorCode.INVALID_JOB)
    >>> client.submit(prompt="What is it?", media=["s3://photos/1.jpg"]).result().answer
    'a cat'

    Each job ends at once as `reply` says, with an answer or a code; where it says None, or there is none, the job waits
    for the test: `start`, `decode`, `write`, then `answer` or `fail`. Settings are the defaults, whatever the
    environment says. There are no dead letters and no quarantine.
    """

    def __init__(self, reply: Reply | None = None, max_queue_depth: int | None = None) -> None:
        self._settings = ProducerSettings.model_construct(max_queue_depth=max_queue_depth)
        self._memory = self._transport = _Memory(self._settings, self._reply)
        self._replies = reply

    @property
    def jobs(self) -> list[Job]:
        """All that were submitted, in their order."""
        return [self.job(job_id) for job_id in list(self._memory.records)]

    def asked(self, job: Job | AsyncJob) -> AnalysisJob:
        """What the job asks for."""
        return SealedJob.model_validate_json(self._memory.record(job.id)["sealed"]).job

    def start(self, job: Job | AsyncJob, stage: Stage = Stage.GENERATE) -> None:
        """A worker has taken the job, and is at this stage."""
        record = self._memory.record(job.id)
        if record["state"] == JobState.QUEUED:
            self._move(job, JobState.RUNNING, attempts=str(int(record["attempts"]) + 1), claimed_at=str(time.time()))
        self._say(job, StageStarted(stage=stage, attempt=self._attempt(job), at=time.time()))

    def decode(self, job: Job | AsyncJob, done: int, total: int, media_index: int = 0) -> None:
        """So many frames of a video are decoded."""
        attempt = self._attempt(job)
        self._say(job, FramesDecoded(media_index=media_index, done=done, total=total, attempt=attempt, at=time.time()))

    def write(self, job: Job | AsyncJob, text: str, channel: str = "answer") -> None:
        """The next text of the answer, or of the reasoning, a token a word."""
        written = self._memory.record(job.id)
        before, tokens = written.get(f"text:{channel}", ""), int(written.get("tokens", 0)) + len(text.split())
        written |= {f"text:{channel}": before + text, "tokens": str(tokens)}
        event = TextGenerated(
            channel=channel,
            text=text,
            offset=len(before),
            num_tokens=tokens,
            attempt=self._attempt(job),
            at=time.time(),
        )
        self._say(job, event)

    def lose(self, job: Job | AsyncJob) -> None:
        """The worker died: the job is queued for another attempt, which begins its text anew."""
        record = self._memory.record(job.id)
        for name in ("text:answer", "text:reasoning", "tokens"):
            record.pop(name, None)
        attempt = self._attempt(job)
        self._say(job, StageStarted(stage=Stage.QUEUED, attempt=attempt, at=time.time(), reason=QueuedAgain.LOST))
        self._move(job, JobState.QUEUED)

    def answer(self, job: Job | AsyncJob, text: str | None = None) -> None:
        """The job has succeeded: with what was written so far, or else with this answer."""
        record = self._memory.record(job.id)
        if record["state"] == JobState.QUEUED:
            self.start(job)
        if text is not None and not record.get("text:answer"):
            self.write(job, text)
        answer, reasoning = record.get("text:answer", ""), record.get("text:reasoning")
        result = JobResult(
            job_id=job.id,
            answer=answer,
            reasoning=reasoning,
            raw_text=(reasoning or "") + answer,
            finish_reason="stop",
            usage=TokenUsage(prompt_tokens=0, visual_tokens=0, completion_tokens=int(record.get("tokens", 0))),
            timings=StageTimings(),
            media=(),
            model=ModelIdentity(name="keye.testing", model_type="none", precision="none"),
            worker=WorkerIdentity(host="keye.testing", pid=0, device="none"),
            attempts=self._attempt(job),
            metadata=self.asked(job).metadata,
        )
        self._memory.end(job.id, result.state, result.model_dump_json())

    def fail(self, job: Job | AsyncJob, code: ErrorCode, message: str = "as the test said", **facts: Any) -> None:
        """The job has ended without an answer; `facts` are fields of its `JobFailure`."""
        facts = {"stage": Stage.GENERATE, "retryable": code.facts.retryable} | facts
        told = {"job_id": job.id, "code": code, "message": message, "metadata": self.asked(job).metadata}
        failure = JobFailure.model_validate({**told, "attempts": self._attempt(job), **facts})
        self._memory.end(job.id, failure.state, failure.model_dump_json())

    def forget(self, job: Job | AsyncJob) -> None:
        """Its record has expired."""
        self._memory.forget(job.id)

    def _reply(self, job_id: str) -> None:
        job = self.job(job_id)
        match self._replies(self.asked(job)) if self._replies else None:
            case ErrorCode() as code:
                self.fail(job, code)
            case str() as text:
                self.answer(job, text)

    def _attempt(self, job: Job | AsyncJob) -> int:
        return int(self._memory.record(job.id)["attempts"])

    def _move(self, job: Job | AsyncJob, state: JobState, **fields: str) -> None:
        self._memory.move(job.id, state, fields)

    def _say(self, job: Job | AsyncJob, event: Event) -> None:
        self._memory.add(keys.events(job.id), {"event": event.model_dump_json()})


class _Memory(Transport):
    """What of Redis a client needs, in dictionaries: records by job id, and streams."""

    def __init__(self, settings: ProducerSettings, reply: Callable[[str], None]) -> None:
        self.max_queue_depth = settings.max_queue_depth
        self.records: dict[str, dict[str, str]] = {}
        self._streams: defaultdict[str, list[Entry]] = defaultdict(list)
        self._owners: dict[str, str] = {}
        self._changed = threading.Condition(threading.RLock())
        self._ids = itertools.count(int(time.time() * 1000))
        self._reply = reply
        self.reader = Reader(self)

    @property
    def redis(self) -> Redis:
        raise NotImplementedError("In memory there are no dead letters and no quarantine, and nothing to verify.")

    def record(self, job_id: str) -> dict[str, str]:
        if job_id not in self.records:
            raise JobNotFound.of(job_id)
        return self.records[job_id]

    def add(self, stream: str, fields: dict[str, str]) -> None:
        with self._changed:
            self._streams[stream].append((f"{next(self._ids)}-0", fields))
            self._changed.notify_all()

    def move(self, job_id: str, state: JobState, fields: dict[str, str]) -> None:
        with self._changed:
            record = self.record(job_id)
            if state not in LEGAL_MOVES[JobState(record["state"])]:
                raise ValueError(f"Job {job_id} is {record['state']}: it cannot become {state}.")
            record |= {"state": state.value, **fields}

    def end(self, job_id: str, state: JobState, outcome_json: str) -> None:
        with self._changed:
            self.move(job_id, state, {"outcome": outcome_json})
            ended = JobEnded(state=state, at=time.time())
            self.add(keys.events(job_id), {"event": ended.model_dump_json()})
            self.add(keys.ENDED, {"job_id": job_id, "state": state.value, "seconds": ""})

    def forget(self, job_id: str) -> None:
        with self._changed:
            del self.records[job_id]
            self._streams.pop(keys.events(job_id), None)

    def submit(self, sealed: SealedJob, retry_failed: bool = False) -> str:
        entry = f"{sealed.job_id} {fingerprint_of(sealed.job)}"
        with self._changed:
            owner = self._owners.get(sealed.job.idempotency_key or "")
            if owner and retry_failed and self._may_take_over(entry, owner):
                owner = None
            queued = sum(record["state"] == JobState.QUEUED for record in self.records.values())
            is_full = owner is None and self.max_queue_depth is not None and queued >= self.max_queue_depth
            # Come again soon: a test's worker is quick.
            reply = ["full", str(queued), "0"] if is_full else ["owner", owner or entry]
            if owner is None and not is_full:
                self.records[sealed.job_id] = sealed.record
                if sealed.job.idempotency_key:
                    self._owners[sealed.job.idempotency_key] = entry
        if isinstance(answer := self._answer(sealed, reply), Refusal):
            raise answer
        if answer == sealed.job_id:
            self._reply(answer)
        return answer

    def _may_take_over(self, entry: str, owner: str) -> bool:
        (_, fingerprint), (earlier, of_earlier) = entry.split(), owner.split()
        state = self.records.get(earlier, {}).get("state")
        return fingerprint == of_earlier and state in (None, *UNANSWERED)

    def submit_many(self, jobs: Sequence[SealedJob | Refusal], retry_failed: bool = False) -> list[str | Refusal]:
        answers: list[str | Refusal] = []
        for job in jobs:
            try:
                answers.append(job if isinstance(job, Refusal) else self.submit(job, retry_failed))
            except Refusal as refusal:
                answers.append(refusal)
        return answers

    def cancel(self, job_id: str, job: JobOutline, outcome_json: str) -> str | None:
        with self._changed:
            state = self.record(job_id)["state"]
            if state == JobState.QUEUED:
                self.end(job_id, JobState.CANCELLED, outcome_json)
        return state

    def read_record(self, job_id: str, *fields: str) -> list[str]:
        record = self.record(job_id)
        return [record.get(field, "") for field in fields]

    def progress(self, job_id: str) -> list[Any]:
        with self._changed:
            record = self.record(job_id)
            order = list(Priority)
            queued = [i for i, each in self.records.items() if each["state"] == JobState.QUEUED]
            queued.sort(key=lambda each: order.index(Priority(self.records[each]["priority"])))
            events = [fields["event"] for _, fields in self._streams[keys.events(job_id)][-MAX_PROGRESS_EVENTS:]]
        place = str(queued.index(job_id)) if job_id in queued else ""
        facts = [record["state"], record["attempts"], record.get("claimed_at", ""), str(time.time())]
        return [*facts, place, "", "", 1, *reversed(events)]

    def look(self, jobs: list[tuple[str, str]]) -> list[Look | KeyeError]:
        with self._changed:
            return [self._look(job_id, seen) for job_id, seen in jobs]

    def _look(self, job_id: str, seen: str) -> Look:
        record, entries = self.records.get(job_id, {}), self._streams[keys.events(job_id)]
        found = [entry for entry in entries if entry[0] == seen] if seen else entries
        newest = found[-1] if found else None
        return Look(record.get("state"), record.get("deadline_at"), record.get("outcome"), newest, time.time())

    def look_at_feed(self) -> FeedLook:
        with self._changed:
            ids = [entry_id for entry_id, _ in self._streams[keys.ENDED]] or [BEGINNING]
        return FeedLook(ids[0], ids[-1], len(ids), num_trimmed=0)

    def read(
        self, streams: dict[str, str], max_entries: int, block_seconds: float | None
    ) -> dict[str, list[Entry] | KeyeError]:
        def found() -> dict[str, list[Entry] | KeyeError]:
            behind = {stream: self._behind(stream, seen)[:max_entries] for stream, seen in streams.items()}
            return {stream: entries for stream, entries in behind.items() if entries}

        with self._changed:
            return self._changed.wait_for(found, block_seconds or 0)

    def _behind(self, stream: str, seen: str) -> list[Entry]:
        entries = self._streams[stream]
        return entries[bisect_right(entries, order_of(seen), key=lambda entry: order_of(entry[0])) :]

    def wake(self, stream: str) -> None:
        self.add(stream, {})

    def close(self) -> None:
        self.reader.close()
