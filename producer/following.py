"""What one caller waits for, where he is on its streams, and for how long; nothing here reaches Redis.

The reader's thread tells a `Following` what it found; the caller, a thread or a task of asyncio, takes it.
"""

import asyncio
import math
import re
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Self

from pydantic import ValidationError

from keye.config import keys
from keye.config.codes import JobState
from keye.config.event import EndedJob, EventsMissing, Heartbeat, JobEnded, read_event
from keye.config.faults import (
    FeedGap,
    InvalidEventId,
    JobNotEnded,
    JobNotFound,
    JobUnreadable,
    KeyeError,
    QueueUnavailable,
)
from keye.config.outcome import OUTCOME, JobFailure, JobResult

# Workers end a job at its deadline, or soon after they take it. Who has found it late for this long hears that none is
# there to do it.
OVERDUE_SECONDS = 55.0
# What is found for one caller and not taken. Of who is slower, the rest stays in Redis, which has room.
MAX_ITEMS = 64

BEGINNING = "0-0"
MAX_ID_PART = 2**64 - 1

Entry = tuple[str, dict[str, str]]
End = JobResult | JobFailure | KeyeError


class Look(NamedTuple):
    """A job's record, and an entry of its stream: the one that was asked for, or the newest; `now` as Redis has it.

    Where an entry was asked for, `oldest` is the id of the first that is left, "" for none, and `num_trimmed` how many
    were dropped before it, None for an unknown number.
    """

    state: str | None
    deadline_at: str | None
    outcome_json: str | None
    entry: Entry | None
    now: float
    oldest: str = ""
    num_trimmed: int | None = 0


class FeedLook(NamedTuple):
    """The ends of the feed of ended jobs, how many it holds, and how many were dropped; None for an unknown number."""

    oldest: str
    newest: str
    length: int
    num_trimmed: int | None


def order_of(entry_id: str) -> tuple[int, int]:
    """Entries' ids as numbers, which sort as the entries do. Raises `InvalidEventId`, since some come from browsers."""
    match = re.fullmatch(r"(\d{1,20})(?:-(\d{1,20}))?", entry_id, re.ASCII)
    if not match or max(map(int, match.groups("0"))) > MAX_ID_PART:
        raise InvalidEventId(f"{entry_id[:40]!r} is no id of an event. Give one as it was read (1764181800000-0).")
    return int(match[1]), int(match[2] or 0)


def id_before(entry_id: str) -> str:
    """The greatest that is smaller than that of an entry."""
    milliseconds, number = order_of(entry_id)
    return f"{milliseconds}-{number - 1}" if number else f"{milliseconds - 1}-{MAX_ID_PART}"


@dataclass(slots=True, eq=False)
class Place:
    """Where a caller is on one stream: behind the entry `seen`, or "" as long as it is to be the newest.

    `job_id` is whose record is looked at too, since a silent stream does not tell that its job is gone or overdue.
    """

    following: "Following"
    stream: str
    seen: str
    job_id: str = ""
    state: JobState = JobState.QUEUED
    looked_at: float = -math.inf
    # How many of the stream's entries lie up to `seen`; None where the caller knows an id only.
    num_before: int | None = None
    # When its job was first found running or queued behind its deadline.
    late_since: float = math.inf
    # All is told that was there when the caller came: who does not wait hears that at least.
    is_answered: bool = False

    def num_missing(self, oldest: str, num_trimmed: int | None) -> int | None:
        """How many entries behind `seen` are gone at the most, None for some; by what a look found."""
        if not oldest or order_of(self.seen) >= order_of(oldest):
            return 0
        return num_trimmed if num_trimmed is None else max(0, num_trimmed - (self.num_before or 0))

    @property
    def is_new(self) -> bool:
        """Whether a look is due before anything is read."""
        return self.looked_at == -math.inf


class Following(ABC):
    """What the reader has found for one caller, who is woken by `wake` when there is something to `take`."""

    def __init__(
        self, wake: Callable[[], object], timeout: float | None, heartbeat_seconds: float | None = None
    ) -> None:
        self._timeout = math.inf if timeout is None else timeout
        self._heartbeat_seconds = math.inf if heartbeat_seconds is None else heartbeat_seconds
        # None would ever come, or nothing else.
        if math.isnan(self._timeout) or not self._heartbeat_seconds > 0:
            raise ValueError(f"timeout is {timeout} and heartbeat_seconds {heartbeat_seconds}: give seconds, or None.")
        self.began_at = self._spoke_at = time.monotonic()
        self.wake = wake
        self.places: dict[str, Place] = {}
        self.fault: KeyeError | None = None
        self.is_closed = False
        # Set by who fills it: there is room again.
        self.resume: Callable[[], object] = lambda: None
        self._items: deque[Any] = deque()
        # Between the reader, who ends a place, and the caller, whose time is up.
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.is_closed = True

    @property
    def is_over(self) -> bool:
        return not self.places and not self._items

    @property
    def has_items(self) -> bool:
        return bool(self._items)

    @property
    def is_full(self) -> bool:
        return len(self._items) >= MAX_ITEMS

    def wait_seconds(self) -> float | None:
        """The longest that the caller waits before he takes again; None where only the reader ends the wait."""
        time_up_at = self.began_at + self._timeout if self._may_give_up() else math.inf
        end = min(time_up_at, self._spoke_at + self._heartbeat_seconds)
        return None if end == math.inf else min(max(0.0, end - time.monotonic()), threading.TIMEOUT_MAX)

    def take(self) -> Any:
        """The next that was found, or None. Raises what was found in place of the rest, such as a `JobNotEnded`."""
        now = time.monotonic()
        if not self._items and now >= self.began_at + self._timeout and self._may_give_up():
            for place in list(self.places.values()):
                self._give_up(place)
        if self._items:
            self._spoke_at = now
            was_full = self.is_full
            item = self._items.popleft()
            if was_full:
                self.resume()
            if isinstance(item, Exception):
                # Where it was raised to others is not his.
                raise item.with_traceback(None)
            return item
        if now >= self._spoke_at + self._heartbeat_seconds:
            self._spoke_at = now
            return Heartbeat(at=time.time())
        return None

    def fail(self, place: Place, error: Exception) -> None:
        """The caller hears this in place of all that would come."""
        self._end(place, error)

    def leave_to_parent(self) -> None:
        """In a forked child, where no reader knows of it: who goes on there must not wait for ever."""
        self._lock = threading.Lock()
        for place in list(self.places.values()):
            self.fail(place, QueueUnavailable("The process was forked while this was read. Begin anew in the child."))

    @abstractmethod
    def read(self, place: Place, entries: Sequence[Entry]) -> None:
        """What came on the stream, perhaps nothing."""

    def _may_give_up(self) -> bool:
        return self.fault is not None or all(place.is_answered for place in list(self.places.values()))

    def _give_up(self, place: Place) -> None:
        """The caller's time is up."""
        self._end(place, *filter(None, [self.fault]))

    def _end(self, place: Place, *last: Any) -> None:
        """No more is told of this place but the `last`; where two race, the second is not heard."""
        with self._lock:
            if place.stream in self.places:
                # In this order: without places and items the caller leaves.
                self._items.extend(last)
                del self.places[place.stream]


class JobFollowing(Following):
    """For who waits for jobs."""

    def look(self, place: Place, look: Look) -> None:
        """What a job's record says."""
        if look.state is None:
            return self.fail(place, JobNotFound.of(place.job_id))
        place.state = JobState(look.state)
        if place.is_new:
            self._begin(place, look.entry)
        # With an outcome, it ended in a state that only later releases know.
        if place.state.is_final or look.outcome_json:
            self._final(place, look.outcome_json or "")
        else:
            with suppress(ValueError):
                if look.now > float(look.deadline_at or math.inf):
                    self._look_late(place)
        return None

    def _look_late(self, place: Place) -> None:
        # By when it was found, not by its deadline: that may have passed long before a worker could take it.
        now = time.monotonic()
        place.late_since = min(place.late_since, now)
        if now - place.late_since > OVERDUE_SECONDS:
            when = "although its deadline has passed"
            self.fail(place, JobNotEnded.of(place.job_id, place.state, when, "No worker is alive."))

    @abstractmethod
    def _begin(self, place: Place, entry: Entry | None) -> None:
        """The first look found this entry."""

    @abstractmethod
    def _final(self, place: Place, outcome_json: str) -> None:
        """The record says that the job has ended."""

    def _give_up(self, place: Place) -> None:
        late = JobNotEnded.of(place.job_id, place.state, f"after {self._timeout:g} s of waiting")
        self.fail(place, self.fault or late)


class EventsFollowing(JobFollowing):
    """For who wants a job's events; unreadable ones are passed over, and how many are gone is told.

    What is found in their place is raised to him.
    """

    def __init__(
        self,
        job_id: str,
        after: str,
        wake: Callable[[], object],
        timeout: float | None,
        heartbeat_seconds: float | None,
    ) -> None:
        super().__init__(wake, timeout, heartbeat_seconds)
        stream = keys.events(job_id)
        self.places[stream] = Place(self, stream, after, job_id, num_before=0 if after == BEGINNING else None)
        self._attempt = 0
        self._is_final = False

    def look(self, place: Place, look: Look) -> None:
        if (num_missing := place.num_missing(look.oldest, look.num_trimmed)) != 0:
            missing = EventsMissing(num_missing=num_missing, at=time.time())
            missing._id = place.seen
            self._items.append(missing)
            # Told: what is left begins there.
            place.seen, place.num_before = id_before(look.oldest), look.num_trimmed
        super().look(place, look)

    def read(self, place: Place, entries: Sequence[Entry]) -> None:
        for entry_id, fields in entries:
            with suppress(ValidationError, KeyError):
                event = read_event(fields["event"], entry_id)
                if isinstance(event, JobEnded):
                    return self._end(place, event)
                # One of an older attempt is from a worker that does not know yet that it lost the job.
                if event is not None and event.attempt >= self._attempt:
                    self._attempt = event.attempt
                    self._items.append(event)
        if self._is_final and not entries:
            # Its last event was read before, or is gone.
            self._end(place)
        return None

    def _begin(self, place: Place, entry: Entry | None) -> None:
        if entry:
            with suppress(ValidationError, KeyError):
                self._attempt = getattr(read_event(entry[1]["event"]), "attempt", 0)

    def _final(self, place: Place, outcome_json: str) -> None:
        self._is_final = True
        # What came between the last read and the look is there by now.
        place.is_answered = False


class EndsFollowing(JobFollowing):
    """For who wants jobs' outcomes: each is found as its id with the outcome, or with what there is in its place."""

    def __init__(self, job_ids: Iterable[str], wake: Callable[[], object], timeout: float | None) -> None:
        super().__init__(wake, timeout)
        for job_id in job_ids:
            stream = keys.events(job_id)
            self.places[stream] = Place(self, stream, "", job_id)

    @property
    def is_full(self) -> bool:
        # Each has one end, and of the other events none is kept.
        return False

    def read(self, place: Place, entries: Sequence[Entry]) -> None:
        for _, fields in entries:
            with suppress(ValidationError, KeyError):
                if isinstance(read_event(fields["event"]), JobEnded):
                    place.looked_at = -math.inf

    def fail(self, place: Place, error: Exception) -> None:
        self._end(place, (place.job_id, error))

    def _begin(self, place: Place, entry: Entry | None) -> None:
        place.seen = entry[0] if entry else BEGINNING

    def _final(self, place: Place, outcome_json: str) -> None:
        try:
            self._end(place, (place.job_id, OUTCOME.validate_json(outcome_json)))
        except ValidationError:
            self.fail(place, JobUnreadable.of(place.job_id, "outcome"))


class FeedFollowing(Following):
    """For who wants to hear of all jobs that end."""

    def __init__(self, after: str | None, wake: Callable[[], object], timeout: float | None) -> None:
        super().__init__(wake, timeout)
        seen = after or ""
        self.places[keys.ENDED] = Place(self, keys.ENDED, seen, num_before=0 if seen == BEGINNING else None)

    def look(self, place: Place, feed: FeedLook) -> None:
        """The first look, and those at a feed that is silent or that was left for a while."""
        if not place.seen or order_of(feed.newest) < order_of(place.seen):
            # It is not that far, or Redis came back with less than it had.
            place.seen = feed.newest
            place.num_before = None if feed.num_trimmed is None else feed.num_trimmed + feed.length
        elif order_of(place.seen) == order_of(BEGINNING):
            place.num_before = feed.num_trimmed
        elif (num_missing := place.num_missing(feed.oldest, feed.num_trimmed)) != 0:
            self.fail(place, FeedGap.of(place.seen, feed.oldest, num_missing))

    def read(self, place: Place, entries: Sequence[Entry]) -> None:
        for entry_id, fields in entries:
            with suppress(ValidationError):
                self._items.append(EndedJob.of(entry_id, fields))


# Begins a following whose caller is woken by what it is given.
Follow = Callable[[Callable[[], object]], Following]


def taken(follow: Follow) -> Iterator[Any]:
    """All that is found, in a thread, which waits for it."""
    ready = threading.Event()
    with follow(ready.set) as following:
        while True:
            while (item := following.take()) is not None:
                yield item
            if following.is_over:
                return
            ready.wait(following.wait_seconds())
            ready.clear()


async def taken_async(follow: Follow) -> AsyncIterator[Any]:
    """The same in an event loop, whose other tasks go on meanwhile."""
    ready = asyncio.Event()
    with follow(partial(asyncio.get_running_loop().call_soon_threadsafe, ready.set)) as following:
        while True:
            while (item := following.take()) is not None:
                yield item
            if following.is_over:
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(following.wait_seconds()):
                    await ready.wait()
            ready.clear()
