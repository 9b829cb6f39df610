"""What clients need of Redis, in dictionaries of this process: for `keye.testing`, and for jobs that run in it."""

import itertools
import math
import threading
import time
from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from redis import Redis

from keye.config import keys
from keye.config.codes import LEGAL_MOVES, UNANSWERED, JobState
from keye.config.event import JobEnded
from keye.config.faults import JobNotFound, KeyeError, Refusal
from keye.config.job import Priority
from keye.config.wire import JobOutline, SealedJob, fingerprint_of
from keye.producer.following import BEGINNING, Entry, FeedLook, Look, order_of
from keye.producer.reader import Reader
from keye.producer.transport import MAX_PROGRESS_EVENTS, Transport


class MemoryTransport(Transport):
    """Records by job id, and streams. `take` is given each job once it is queued, by the thread that submits it.

    Of ended jobs the newest `max_ended` are kept; None keeps all.
    """

    def __init__(
        self, take: Callable[[SealedJob], None], max_queue_depth: int | None = None, max_ended: int | None = None
    ) -> None:
        self.max_queue_depth = max_queue_depth
        self.records: dict[str, dict[str, str]] = {}
        self._streams: defaultdict[str, list[Entry]] = defaultdict(list)
        self._owners: dict[str, str] = {}
        self._changed = threading.Condition(threading.RLock())
        self._ids = itertools.count(int(time.time() * 1000))
        self._take = take
        self._max_ended = max_ended
        self._ended: deque[str] = deque()
        self._num_trimmed = 0
        self.reader = Reader(self)

    @property
    def redis(self) -> Redis:
        raise NotImplementedError("In memory there are no workers, dead letters or quarantine to tell of.")

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
            self._ended.append(job_id)
            if self._max_ended is not None and len(self._ended) > self._max_ended:
                self.forget(oldest := self._ended.popleft())
                self._owners = {key: entry for key, entry in self._owners.items() if entry.split()[0] != oldest}
                del self._streams[keys.ENDED][0]
                self._num_trimmed += 1

    def forget(self, job_id: str) -> None:
        with self._changed:
            del self.records[job_id]
            self._streams.pop(keys.events(job_id), None)

    def submit(self, sealed: SealedJob, retry_failed: bool = False) -> str:
        entry = f"{sealed.job_id} {fingerprint_of(sealed.job)}"
        with self._changed:
            owner = self._owners.get(sealed.job.idempotency_key or "")
            if owner is None and sealed.job_id in self.records:
                return sealed.job_id
            if owner and retry_failed and self._may_take_over(entry, owner):
                owner = None
            num_queued = 0 if self.max_queue_depth is None else self._num_queued
            is_full = owner is None and self.max_queue_depth is not None and num_queued >= self.max_queue_depth
            # Come again soon: a test's worker is quick.
            reply = ["full", str(num_queued), "0"] if is_full else ["owner", owner or entry]
            if owner is None and not is_full:
                self.records[sealed.job_id] = sealed.record
                if sealed.job.idempotency_key:
                    self._owners[sealed.job.idempotency_key] = entry
        if isinstance(answer := self._answer(sealed, reply), Refusal):
            raise answer
        if answer == sealed.job_id:
            self._take(sealed)
        return answer

    @property
    def _num_queued(self) -> int:
        return sum(record["state"] == JobState.QUEUED for record in self.records.values())

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
        return FeedLook(ids[0], ids[-1], len(ids), self._num_trimmed)

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

    def let_go(self, job_ids: Iterable[str]) -> None:
        """They go with this process, or by `max_ended`."""

    def kept_seconds(self) -> float:
        return math.inf

    def close(self) -> None:
        self.reader.close()
