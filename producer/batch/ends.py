"""How the jobs ended that a batch has in flight: heard of in the feed of ended jobs, and looked up by the hundred."""

import threading
import time
from collections.abc import Iterable, Iterator, Set
from typing import TYPE_CHECKING

from keye.config.faults import FeedGap, JobNotEnded, QueueUnavailable
from keye.producer.following import End, Following

if TYPE_CHECKING:
    from keye.producer.client import Client

# All are looked at so often, should the feed have passed one over: it may not be read, or a record is gone.
LOOK_SECONDS = 10.0
# Until the feed is followed, and what ended before is to be looked for.
FIRST_LOOK_SECONDS = 0.5
LOOKED_AT_A_TIME = 250


class Ends:
    """Raises `QueueUnavailable` where Redis refuses, or has been away for a minute."""

    def __init__(self, client: "Client", job_ids: Set[str]) -> None:
        """`job_ids` are those in flight, whenever it is asked."""
        self._client = client
        self._job_ids = job_ids
        # Of these it is not known that they end later than now.
        self._suspects: set[str] = set()
        self._feed: Following | None = None
        self._is_news = threading.Event()
        self._look_at = 0.0

    def wait(self, seconds: float) -> Iterator[list[tuple[str, End]]]:
        """Those that have ended, waited for so long; some at a time, as answers may be long."""
        heard = self._heard()
        if not heard and self._is_news.wait(max(0.0, min(seconds, self._look_at - time.monotonic()))):
            heard = self._heard()
        if time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + LOOK_SECONDS
            heard = list(self._job_ids)
        for i in range(0, len(heard), LOOKED_AT_A_TIME):
            yield list(self.look(heard[i : i + LOOKED_AT_A_TIME]))

    def look(self, job_ids: Iterable[str]) -> Iterator[tuple[str, End]]:
        """Those of them that have ended."""
        for job, end in self._client.results(list(job_ids), timeout=0):
            if isinstance(end, QueueUnavailable):
                raise end.with_traceback(None)
            if job.id is not None and not isinstance(end, JobNotEnded):
                yield job.id, end

    def close(self) -> None:
        if self._feed is not None:
            self._feed.is_closed = True
            self._feed = None

    def suspect(self, job_id: str) -> None:
        """It may have ended long ago."""
        self._suspects.add(job_id)

    def wake(self) -> None:
        """End a wait."""
        self._is_news.set()

    def _heard(self) -> list[str]:
        """In the order in which they ended."""
        self._is_news.clear()
        if self._feed is None:
            self._feed = self._client.follow_feed(None, None)(self._is_news.set)
            self._look_at = time.monotonic() + FIRST_LOOK_SECONDS
        heard = dict.fromkeys(self._suspects)
        self._suspects.clear()
        try:
            while (ended := self._feed.take()) is not None:
                heard[ended.job_id] = None
        except (FeedGap, QueueUnavailable) as fault:
            self.close()
            if isinstance(fault, QueueUnavailable):
                raise
        return [job_id for job_id in heard if job_id in self._job_ids]
