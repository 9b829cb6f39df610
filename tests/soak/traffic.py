"""Jobs of all kinds, sent without end at a steady rate, each with the ends that are right for it."""

import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from keye.config.codes import ErrorCode
from keye.config.faults import QueueUnavailable
from keye.config.job import Priority
from keye.config.outcome import JobFailure, JobResult
from keye.producer import Client, Job
from keye.worker.demo.errands import Errand

ANY_ANSWER = ""


@dataclass(frozen=True)
class Sent:
    """`right` are the answers and codes that the job may end with."""

    job: Job
    right: frozenset[str]


class Traffic(threading.Thread):
    """Draws from `errands`. Where Redis does not say whether a job was taken, asks again under the same key."""

    def __init__(self, client: Client, errands: list[Errand], jobs_per_second: float) -> None:
        super().__init__(name="traffic")
        self._client = client
        self._errands = errands
        self._jobs_per_second = jobs_per_second
        self._draw = random.Random(0)
        self._is_over = threading.Event()
        self.sent: list[Sent] = []
        self.store_is_away = False

    def run(self) -> None:
        while not self._is_over.wait(self._draw.expovariate(self._jobs_per_second)):
            self.send(self._draw.choice(self._errands))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self.join()

    def burst(self, number: int, *also_right: str, **fields: object) -> list[Job]:
        return [self.send(self._draw.choice(self._errands), also_right, **fields) for _ in range(number)]

    def send(self, errand: Errand, also_right: Iterable[str] = (), **fields: object) -> Job:
        chosen = {"priority": self._draw.choice(list(Priority)), "idempotency_key": str(uuid.uuid4())}
        asked = errand.job.model_copy(update=chosen | fields)
        right = {errand.expected, *also_right}
        if self.store_is_away and any(part.uri.startswith("s3:") for part in asked.media):
            right.add(ErrorCode.MEDIA_UNREACHABLE)
        while True:
            try:
                job = self._client.submit(asked)
                break
            except QueueUnavailable:
                time.sleep(0.5)
        self.sent.append(Sent(job, frozenset(map(str, right))))
        return job

    def ends(self, timeout: float) -> tuple[Counter[str], list[str]]:
        """How many ended in which way, and all that did not end rightly, or not within `timeout` seconds."""
        right = {sent.job.id: sent.right for sent in self.sent}
        ways: Counter[str] = Counter()
        wrong = []
        for job, end in self._client.results([sent.job for sent in self.sent], timeout):
            match end:
                case JobResult():
                    way, words = "answered", {end.answer, ANY_ANSWER}
                case JobFailure():
                    way, words = str(end.code), {str(end.code)}
                case _:
                    way, words = type(end).__name__, set()
            ways[way] += 1
            if job.id is None or not words & right.pop(job.id):
                wrong.append(f"{job.id}: {end!r}")
        return ways, [*wrong, *(f"{job_id}: never told" for job_id in right)]
