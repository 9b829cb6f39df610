"""One thread of a process reads for all who wait in it, over one connection, and tells each what is his."""

import atexit
import logging
import math
import os
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from itertools import islice
from queue import SimpleQueue
from typing import Protocol
from weakref import WeakSet

from keye.config import keys
from keye.config.connection import SOCKET_TIMEOUT_SECONDS
from keye.config.faults import KeyeError, QueueUnavailable
from keye.producer.following import (
    BEGINNING,
    Entry,
    EventsFollowing,
    FeedFollowing,
    FeedLook,
    Following,
    JobFollowing,
    Look,
    Place,
    order_of,
)

# One blocking read; well below the socket's timeout, so that silence is not taken for a dead connection.
READ_SECONDS = 2.0
# A stream that is silent for so long may be that of a job that is gone: its record is looked at, of so many at a time.
LOOK_SECONDS = 2.0
MAX_LOOKS = 500
# Of one read, from one stream and in all.
MAX_ENTRIES, MAX_ALL_ENTRIES = 64, 5000
# Callers sit out a restart or a failover of Redis up to this long.
OUTAGE_SECONDS = 60.0
OUTAGE_PAUSE_SECONDS = 0.5
# Without anyone who waits, the thread ends.
IDLE_SECONDS = 10.0

log = logging.getLogger(__name__)


class Streams(Protocol):
    """Where jobs, their events and the feed of ended ones can be read. All raise `QueueUnavailable`."""

    def look(self, jobs: list[tuple[str, str]]) -> list[Look | KeyeError]:
        """Of each job, given with an entry's id: its record, that entry and what is gone; or with "" the newest."""

    def look_at_feed(self) -> FeedLook | KeyeError: ...

    def read(
        self, streams: dict[str, str], max_entries: int, block_seconds: float | None
    ) -> dict[str, list[Entry] | KeyeError]:
        """What lies on each stream behind the entry given, if anything does, waited for if `block_seconds` is set."""

    def wake(self, stream: str) -> None:
        """Have a read of this stream end."""


class Reader:
    """Serves any number of callers. A forked child begins with nobody who waits."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self.begin_anew()
        _readers.add(self)

    def leave_to_parent(self) -> None:
        for following in self._followings:
            following.leave_to_parent()
        self.begin_anew()

    def begin_anew(self) -> None:
        self._changed = threading.Condition()
        self._followings: set[Following] = set()
        self._threads: tuple[threading.Thread, ...] = ()
        self._is_closing = False
        self._is_reading = False
        self._is_woken = False
        self._wakes: SimpleQueue[bool] = SimpleQueue()
        self._stream = keys.reader(uuid.uuid4().hex)
        self._seen = BEGINNING
        self._fault: QueueUnavailable | None = None
        self._away_since = math.inf

    def follow(self, following: Following) -> Following:
        """Tell it from now on what comes, until it is over or closed."""
        following.resume = self._interrupt
        with self._changed:
            if not self._threads:
                # The first, because who follows must not wait for Redis himself: he may be an event loop.
                waker = _start("keye-waker", partial(self._wake, self._wakes))
                try:
                    self._threads = waker, _start("keye-reader", self._run)
                except RuntimeError:
                    # The process can begin no more threads.
                    self._end_waker()
                    raise
            self._followings.add(following)
            following.fault = self._fault
        self._interrupt()
        return following

    def close(self) -> None:
        """Whoever waits hears that there is nothing to wait for."""
        with self._changed:
            followings, self._followings = self._followings, set()
        for following in followings:
            _fail_all(following, QueueUnavailable("The client was closed. Wait with another."))
        self.stop(SOCKET_TIMEOUT_SECONDS)

    def stop(self, join_seconds: float) -> None:
        """End the threads, which come back for whoever follows next. Whoever waits is told nothing."""
        with self._changed:
            self._followings = set()
            self._is_closing, threads = True, self._threads
        self._interrupt()
        for thread in threads:
            # What they are at would connect once more.
            thread.join(join_seconds)
        self._is_closing = False

    def _interrupt(self) -> None:
        """Have the thread look whom it reads for."""
        with self._changed:
            self._changed.notify()
            if self._is_reading and not self._is_woken:
                self._is_woken = True
                self._wakes.put(True)

    def _end_waker(self) -> None:
        self._wakes.put(False)
        self._wakes = SimpleQueue()

    def _wake(self, wakes: "SimpleQueue[bool]") -> None:
        while wakes.get():
            self._streams.wake(self._stream)

    def _run(self) -> None:
        while followings := self._next():
            try:
                self._round(followings)
                if self._fault:
                    self._recover()
            except QueueUnavailable as fault:
                self._sit_out(followings, fault)
            except Exception as error:
                # Where nobody waits any more, its connections were closed under it.
                if self._followings:
                    log.exception("The reader of jobs' events failed")
                for following in followings:
                    _fail_all(following, error)

    def _next(self) -> list[Following]:
        """Who waits; nobody, once nobody has for a while."""
        with self._changed:
            self._is_reading = False
            while True:
                self._followings = {each for each in self._followings if each.places and not each.is_closed}
                self._is_woken = False
                if self._followings:
                    self._is_reading = True
                    return list(self._followings)
                self._fault, self._away_since = None, math.inf
                if self._is_closing or (not self._changed.wait(IDLE_SECONDS) and not self._followings):
                    self._threads = ()
                    self._end_waker()
                    return []

    def _round(self, followings: list[Following]) -> None:
        """Look at the records that are due, read what the streams hold, and tell it."""
        now = time.monotonic()
        places = [place for each in followings if not each.is_full for place in list(each.places.values())]
        told = self._look(places, now)
        mates: defaultdict[str, list[Place]] = defaultdict(list)
        for place in places:
            if place.stream in place.following.places:
                mates[place.stream].append(place)
        reads = {stream: _farthest_back(on_it) for stream, on_it in mates.items()}
        is_new = any(not place.is_answered for on_it in mates.values() for place in on_it)
        # Those who have heard something should not wait for others to.
        block = None if is_new or told else READ_SECONDS
        max_entries = max(1, min(MAX_ENTRIES, MAX_ALL_ENTRIES // (len(reads) + 1)))
        found = self._streams.read(reads | {self._stream: self._seen}, max_entries, block)
        woken = found.pop(self._stream, ())
        if isinstance(woken, KeyeError):
            # It may not be read, and the read that failed with it did not wait.
            time.sleep(OUTAGE_PAUSE_SECONDS)
        elif woken:
            self._seen = woken[-1][0]
        now = time.monotonic()
        for stream in found.keys() | (mates.keys() if is_new else ()):
            entries = found.get(stream, [])
            for place in mates[stream]:
                if isinstance(entries, KeyeError):
                    place.following.fail(place, entries)
                    told.add(place.following)
                elif self._tell(place, entries, now):
                    told.add(place.following)
        for following in told:
            _wake_up(following)

    def _look(self, places: list[Place], now: float) -> set[Following]:
        """Those of new places, and of the longest silent; returns whom it has told something."""
        feeds = [(place, each) for place in places if isinstance(each := place.following, FeedFollowing)]
        if feeds:
            # Each time: it is trimmed, and who is slow may be left behind.
            feed = self._streams.look_at_feed()
            for place, watching in feeds:
                if isinstance(feed, KeyeError):
                    watching.fail(place, feed)
                else:
                    watching.look(place, feed)
        jobs = [place for place in places if isinstance(place.following, JobFollowing)]
        new = [place for place in jobs if place.is_new]
        silent = [place for place in jobs if not place.is_new and place.looked_at < now - LOOK_SECONDS]
        silent.sort(key=lambda place: place.looked_at)
        due = iter(new + silent[:MAX_LOOKS])
        while batch := list(islice(due, MAX_LOOKS)):
            # Who waits for an end does not mind what is gone.
            asked = [place.seen if isinstance(place.following, EventsFollowing) else "" for place in batch]
            looks = self._streams.look([(place.job_id, seen) for place, seen in zip(batch, asked, strict=True)])
            for place, look in zip(batch, looks, strict=True):
                following = place.following
                if isinstance(look, KeyeError):
                    following.fail(place, look)
                elif isinstance(following, JobFollowing):
                    following.look(place, look)
                place.looked_at = now
        return {place.following for place in places if place.stream not in place.following.places}

    def _tell(self, place: Place, entries: list[Entry], now: float) -> bool:
        """Whether it was news to him."""
        if entries and order_of(entries[0][0]) <= order_of(place.seen):
            # Others on this stream are not as far.
            entries = [entry for entry in entries if order_of(entry[0]) > order_of(place.seen)]
        if entries:
            place.seen, place.looked_at = entries[-1][0], now
            if place.num_before is not None:
                place.num_before += len(entries)
        was_answered, place.is_answered = place.is_answered, place.is_answered or not entries
        following = place.following
        following.read(place, entries)
        # Who waits for ends takes nothing of what a job says before.
        return not was_answered or following.has_items or place.stream not in following.places

    def _sit_out(self, followings: list[Following], fault: QueueUnavailable) -> None:
        """Redis is away: who has waited long enough for it to come back is told so, the others wait on."""
        now = time.monotonic()
        with self._changed:
            self._fault, self._away_since = fault, min(self._away_since, now)
        for following in followings:
            following.fault = fault
            if now - max(self._away_since, following.began_at) > OUTAGE_SECONDS:
                _fail_all(following, fault)
            else:
                _wake_up(following)
        time.sleep(OUTAGE_PAUSE_SECONDS)

    def _recover(self) -> None:
        with self._changed:
            self._fault, self._away_since = None, math.inf
            for following in self._followings:
                following.fault = None


def _start(name: str, run: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread


def _farthest_back(places: list[Place]) -> str:
    # Most streams have one reader, and each round goes through all.
    return places[0].seen if len(places) == 1 else min((place.seen for place in places), key=order_of)


def _fail_all(following: Following, error: Exception) -> None:
    for place in list(following.places.values()):
        following.fail(place, error)
    _wake_up(following)


def _wake_up(following: Following) -> None:
    try:
        following.wake()
    except RuntimeError:
        # The event loop that it waited in is closed.
        following.is_closed = True


_readers: "WeakSet[Reader]" = WeakSet()


def _leave_to_parent() -> None:
    for reader in list(_readers):
        reader.leave_to_parent()


@atexit.register
def _stop_all() -> None:
    # A daemon thread that Python ends while it reads JSON, in a library of Rust, takes the process down (SIGABRT).
    for reader in list(_readers):
        reader.stop(join_seconds=1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)
