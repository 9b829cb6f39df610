"""A worker's side for batches: it answers what is queued in a thread of the test, and counts how often."""

import threading
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Self

import pytest
from redis import Redis

from keye.config import keys
from keye.config.codes import ErrorCode
from keye.config.job import Priority
from keye.producer.batch import ends
from tests.support.sides import RedisWorker


class Answering:
    """A context manager. Each job is answered by its prompt, `fail` fails; `times` is how often each was run."""

    def __init__(self, redis: Redis, result_ttl_seconds: int = 3600) -> None:
        self._redis = redis
        self._worker = RedisWorker(redis, result_ttl_seconds)
        self._is_over = threading.Event()
        self._may_go_on = threading.Event()
        self._may_go_on.set()
        self.pause = self._may_go_on.clear
        self.go_on = self._may_go_on.set
        self._thread = threading.Thread(target=self._run, name="answering")
        self.times: Counter[str] = Counter()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self.go_on()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_over.wait(0.002):
            self._may_go_on.wait()
            self.answer_all()

    def answer_all(self) -> None:
        """Those that wait by now."""
        for job_id in self._redis.zrange(keys.queued(Priority.LOW), 0, -1):
            job = SimpleNamespace(id=job_id)
            self.times[job_id] += 1
            asked = self._worker.asked(job)
            prompt = asked.prompt or asked.messages[-1].content
            if prompt == "fail":
                self._worker.fail(job, ErrorCode.MEDIA_NOT_FOUND)
            else:
                self._worker.answer(job, prompt)


@pytest.fixture(autouse=True)
def _is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are answered at once, before the feed is followed, are looked for soon."""
    monkeypatch.setattr(ends, "FIRST_LOOK_SECONDS", 0.05)


@pytest.fixture
def answering(redis: Redis) -> Iterator[Answering]:
    with Answering(redis) as answering:
        yield answering
