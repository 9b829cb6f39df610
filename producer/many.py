"""Many jobs at once, as both clients need them: which handle an end belongs to, and ends in the order of their jobs."""

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

from keye.config.faults import QueueFull, Refusal
from keye.config.wire import SealedJob
from keye.producer.following import End

# Enough that the way to Redis and back no longer counts, and few enough that nobody waits for their replies; and how
# many characters their media have, which are held in memory several times meanwhile.
JOBS_PER_ROUND_TRIP, CHARS_PER_ROUND_TRIP = 250, 8 * 2**20
# Of jobs that are submitted and whose ends are not yet read.
BATCHES_AHEAD = 4

Handle = TypeVar("Handle")


def batches(
    jobs: Iterable[SealedJob | Refusal], first: int = JOBS_PER_ROUND_TRIP
) -> Iterator[list[SealedJob | Refusal]]:
    """As many as go in a round trip; to begin with `first`, and then twice as many each time."""
    batch: list[SealedJob | Refusal] = []
    size, num_chars = first, 0
    for job in jobs:
        batch.append(job)
        num_chars += num_chars_of(job)
        if len(batch) == size or num_chars > CHARS_PER_ROUND_TRIP:
            yield batch
            batch, size, num_chars = [], min(2 * size, JOBS_PER_ROUND_TRIP), 0
    if batch:
        yield batch


def num_chars_of(job: SealedJob | Refusal) -> int:
    """That its media have, which may be inside it."""
    return 0 if isinstance(job, Refusal) else sum(len(medium.uri) for medium in job.job.all_media())


def refused_as_full(answers: Iterable[object]) -> dict[int, float]:
    """The places of those that found the queue full, and how many seconds to wait."""
    return {i: answer.retry_after_seconds for i, answer in enumerate(answers) if isinstance(answer, QueueFull)}


class Awaited(Generic[Handle]):
    """Handles by their jobs' ids: two may be of one job, and a refusal has none."""

    def __init__(self, handles: Iterable[Handle | Refusal]) -> None:
        self.refused: list[tuple[Handle | Refusal, Refusal]] = []
        self.by_id: defaultdict[str, list[Handle]] = defaultdict(list)
        for handle in handles:
            if isinstance(handle, Refusal):
                self.refused.append((handle, handle))
            else:
                self.by_id[handle.id].append(handle)  # type: ignore[attr-defined]


class InOrder:
    """Takes ends as they come and gives them in the order of the handles."""

    def __init__(self, handles: Iterable[object]) -> None:
        self._handles = deque(map(id, handles))
        self._ends: dict[int, End] = {}

    def add(self, handle: object, end: End) -> Iterator[End]:
        self._ends[id(handle)] = end
        while self._handles and self._handles[0] in self._ends:
            yield self._ends.pop(self._handles.popleft())
