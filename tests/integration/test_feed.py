"""The feed of ended jobs: followed, left behind, trimmed, spoiled and lost; and what is measured by it."""

import time
from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import Any

import pytest
from pydantic import SecretStr
from redis import Redis

from keye.config import keys
from keye.producer import Client, FeedGap, InvalidJob, JobFailure, JobState, QueueFull, QueueUnavailable, Settings
from tests.support.conditions import eventually
from tests.support.sides import RedisWorker
from tests.support.worker_side import JOB, answer, settle


def end(redis: Redis, number: int, seconds: str = "1", entry_id: str = "*") -> str:
    fields = {"job_id": str(number), "state": "SUCCEEDED", "seconds": seconds}
    return redis.xadd(keys.ENDED, fields, entry_id)


def ended(watch: Iterator[Any]) -> list[int]:
    return [int(each.job_id) for each in watch]


class TestWatch:
    @pytest.mark.holds("docs/producers.md#many-jobs", "`client.watch(after=id)` is the feed of all jobs that end")
    @pytest.mark.holds(
        "docs/keep-my-own-table.md#how-do-i-keep-the-state-of-jobs-in-a-table-of-my-own",
        "What you want to search, join or keep goes into your database",
    )
    @pytest.mark.holds("docs/design.md#one-job-walked", "which `client.watch` reads")
    def test_who_watches_hears_all_that_end_in_their_order(
        self, client: Client, redis: Redis, meanwhile: Callable[..., Any]
    ) -> None:
        feed = client.watch(after="0", timeout=60)
        following = meanwhile(lambda: [each.job_id for each in islice(feed, 1_000)])
        jobs = client.submit_many([JOB] * 1_000)
        for job in jobs:
            job.cancel()
        order = [fields["job_id"] for _, fields in redis.xrange(keys.ENDED)]
        assert sorted(order) == sorted(job.id for job in jobs)
        assert following.result(60) == order
        assert [each.job_id for each in client.watch(after="0", timeout=0)] == order

    @pytest.mark.holds("docs/producers.md#what-can-be-raised", "some of what followed that id is no longer in the feed")
    @pytest.mark.parametrize("timeout", [0, None])
    @pytest.mark.parametrize("is_emptied", [False, True])
    def test_who_was_left_behind_hears_of_the_gap(
        self, client: Client, redis: Redis, timeout: float | None, is_emptied: bool, meanwhile: Callable[..., Any]
    ) -> None:
        ids = [end(redis, number) for number in range(10)]
        redis.xtrim(keys.ENDED, 0 if is_emptied else 5, approximate=False)
        with pytest.raises(FeedGap, match=f"no longer holds up to {10 if is_emptied else 5} .* after {ids[2]}") as told:
            meanwhile(next, client.watch(after=ids[2], timeout=timeout)).result(20)
        assert told.value.num_missing == (10 if is_emptied else 5), "at the most: it is not known how many came before"
        kept = [] if is_emptied else [5, 6, 7, 8, 9]
        assert ended(client.watch(after="0", timeout=0)) == kept
        assert ended(client.watch(after=ids[-1], timeout=0)) == []

    def test_who_is_overtaken_while_he_reads_hears_of_the_gap(self, client: Client, redis: Redis) -> None:
        for number in range(1_000):
            end(redis, number)
        watch = client.watch(after="0", timeout=60)
        heard = [next(watch)]
        (following,) = client._transport.reader._followings
        eventually(lambda: following.is_full)
        redis.xtrim(keys.ENDED, 10, approximate=False)
        with pytest.raises(FeedGap) as told:
            heard += watch
        assert told.value.num_missing == 990 - len(heard), "exactly: he has read from the first on"
        assert ended(iter(heard)) == list(range(len(heard)))

    @pytest.mark.parametrize("after", ["9999999999999-0", f"{2**64 - 1}-{2**64 - 1}"])
    def test_an_id_that_the_feed_has_not_reached_is_the_newest(
        self, client: Client, redis: Redis, meanwhile: Callable[..., Any], after: str
    ) -> None:
        end(redis, 1)
        watch = client.watch(after=after, timeout=60)
        following = meanwhile(next, watch)
        eventually(lambda: client._transport.reader._is_reading and redis.info("clients")["blocked_clients"])
        end(redis, 2)
        assert following.result(20).job_id == "2"

    def test_a_feed_that_begins_again_with_lower_ids_is_heard(
        self, client: Client, redis: Redis, meanwhile: Callable[..., Any]
    ) -> None:
        end(redis, 1, entry_id=f"{int(time.time() + 3600) * 1000}-0")
        watch = client.watch(after="0", timeout=60)
        assert ended(islice(watch, 1)) == [1]
        watch = client.watch(timeout=60)
        following = meanwhile(next, watch)
        eventually(lambda: redis.info("clients")["blocked_clients"])
        # As after a failover, or a flush, by a clock that is behind.
        redis.delete(keys.ENDED)
        time_is_up = time.monotonic() + 20
        for number in count(2):
            if following.done() or time.monotonic() > time_is_up:
                break
            end(redis, number)
            time.sleep(0.1)
        assert int(following.result(0).job_id) >= 2

    @pytest.mark.parametrize(
        "fields",
        [
            {"": ""},
            {"job_id": "x"},
            {"state": "SUCCEEDED"},
            {"job_id": b"\xff"},
            {"a": "b", "c": "d", "e": "inf"},
        ],
    )
    def test_what_strangers_write_is_passed_over(self, client: Client, redis: Redis, fields: dict[str, Any]) -> None:
        end(redis, 1)
        redis.xadd(keys.ENDED, fields)
        end(redis, 2)
        assert ended(client.watch(after="0", timeout=0)) == [1, 2]

    def test_an_entry_is_where_it_lies_and_has_the_state_it_says(self, client: Client, redis: Redis) -> None:
        told = {"job_id": "7", "state": "REFUSED", "id": "evil", "at": "0"}
        entry_id = redis.xadd(keys.ENDED, told)
        (found,) = client.watch(after="0", timeout=0)
        assert (found.id, found.state, found.at > 0) == (entry_id, "REFUSED", True)

    def test_a_feed_that_is_none_costs_those_who_wait_for_jobs_nothing(
        self, client: Client, redis: Redis, meanwhile: Callable[..., Any]
    ) -> None:
        job = client.submit(JOB)
        waiting = meanwhile(job.result, 60)
        redis.set(keys.ENDED, "x")
        for after in (None, "0", "9-9"):
            with pytest.raises(QueueUnavailable, match="WRONGTYPE"):
                next(client.watch(after=after))
        settle(redis, job, answer(job))
        assert waiting.result(20).answer == "a red square"


class TestPace:
    @pytest.fixture
    def worker(self, redis: Redis) -> RedisWorker:
        redis.set(keys.CONTEXT, 8192)
        return RedisWorker(redis)

    @pytest.mark.holds("docs/design.md#one-job-walked", "from which `progress` and")
    def test_seconds_left_fall_as_the_queue_empties(self, client: Client, redis: Redis, worker: RedisWorker) -> None:
        for seconds in ("3", "5"):
            end(redis, 1, seconds)
        jobs = client.submit_many([JOB] * 6)
        assert jobs[-1].progress.seconds_left is None
        for job in jobs[:2]:
            worker.start(job)
        # Two run at once, for 4 s each.
        assert [job.progress.seconds_left for job in jobs[2:]] == [4, 6, 8, 10]
        jobs[2].cancel()
        assert [job.progress.seconds_left for job in jobs[3:]] == [4, 6, 8]
        left = jobs[0].progress.seconds_left
        assert left is not None
        assert 0 < left < 4

    def test_without_a_worker_nothing_is_estimated(self, client: Client, redis: Redis) -> None:
        end(redis, 1)
        job = client.submit(JOB)
        redis.zadd(keys.LEASES, {"another": time.time() + 30})
        told = job.progress
        assert (told.has_worker, told.place, told.seconds_left) == (False, 0, None)
        redis.set(keys.CONTEXT, 8192)
        assert (job.progress.has_worker, job.progress.seconds_left) == (True, 1)

    def test_a_job_that_waits_for_another_attempt_has_no_place(
        self, client: Client, redis: Redis, worker: RedisWorker
    ) -> None:
        end(redis, 1)
        job = client.submit(JOB)
        worker.start(job)
        redis.hset(keys.record(job.id), "state", "QUEUED")
        told = job.progress
        assert (told.state, told.place, told.seconds_left) == (JobState.QUEUED, None, None)

    @pytest.mark.holds("docs/design.md#one-job-walked", "`QueueFull` know how long jobs take")
    @pytest.mark.holds(
        "docs/operations.md#how-do-i-keep-a-backlog-from-growing-without-end",
        "whose `retry_after_seconds` is when the next is likely to fit",
    )
    def test_a_full_queue_says_when_it_is_likely_to_have_room(self, redis: Redis, redis_url: str) -> None:
        with Client(Settings(redis_url=SecretStr(redis_url), max_queue_depth=3)) as client:
            for _ in range(100):
                end(redis, 1, "8")
            client.submit_many([JOB] * 3)
            redis.zadd(keys.LEASES, dict.fromkeys("abcd", time.time() + 30))
            with pytest.raises(QueueFull) as full:
                client.submit(JOB)
            assert full.value.retry_after_seconds == 2
            redis.delete(keys.ENDED)
            with pytest.raises(QueueFull, match="Try again in 30 s"):
                client.submit(JOB)

    @pytest.mark.parametrize("seconds", ["inf", "nan", "-5", "1e300", "0x10", "", "soon"])
    def test_seconds_that_are_none_are_not_measured_by(
        self, redis: Redis, redis_url: str, worker: RedisWorker, seconds: str
    ) -> None:
        with Client(Settings(redis_url=SecretStr(redis_url), max_queue_depth=2)) as client:
            end(redis, 1, seconds)
            redis.xadd(keys.ENDED, {"": ""})
            running, queued = client.submit_many([JOB] * 2)
            worker.start(running)
            client.submit(JOB)
            assert queued.progress.seconds_left in (None, 16)
            with pytest.raises(QueueFull) as full:
                client.submit(JOB)
            assert full.value.retry_after_seconds in (30, 16)

    @pytest.mark.parametrize("fields", [{"attempts": "many"}, {"claimed_at": "x"}])
    def test_a_record_that_tells_no_progress_is_a_typed_error(
        self, client: Client, redis: Redis, worker: RedisWorker, fields: dict[str, str]
    ) -> None:
        end(redis, 1)
        job = client.submit(JOB)
        worker.start(job)
        redis.hset(keys.record(job.id), mapping=fields)
        with pytest.raises(Exception, match="nothing that this release can read") as told:
            job.progress  # noqa: B018
        assert type(told.value).__name__ == "JobUnreadable"

    def test_a_trimmed_stream_tells_what_is_left_of_it(self, client: Client, redis: Redis, worker: RedisWorker) -> None:
        job = client.submit(JOB)
        worker.start(job)
        for number in range(300):
            worker.decode(job, number, 300)
        redis.xtrim(keys.events(job.id), 1, approximate=False)
        assert (job.progress.stage, job.progress.frames_done) == ("decode", 299)
        redis.delete(keys.events(job.id))
        assert (job.progress.stage, job.progress.frames_done) == ("open", None)


class TestMap:
    def answer_all(self, redis: Redis, is_over: Callable[[], bool]) -> None:
        worker = RedisWorker(redis)
        while not is_over():
            for job in worker.jobs:
                worker.answer(job, worker.asked(job).media[0].uri)

    @pytest.mark.holds("docs/producers.md#many-jobs", "`map` submits some hundreds ahead of what you read")
    @pytest.mark.holds(
        "docs/collect-many-results.md#in-the-order-of-my-list-and-without-holding-all-of-it",
        "`map` asks the same about each, some hundreds ahead",
    )
    def test_media_without_end_are_read_a_bounded_way_ahead(
        self, client: Client, redis: Redis, meanwhile: Callable[..., Any]
    ) -> None:
        taken: list[int] = []
        media = (taken.append(number) or f"s3://photos/{number}.jpg" for number in count())
        is_over: list[bool] = []
        working = meanwhile(self.answer_all, redis, lambda: bool(is_over))
        mapping = client.map("?", media)
        assert [next(mapping).answer for _ in range(3)] == [f"s3://photos/{number}.jpg" for number in range(3)]
        assert len(taken) <= 1_000
        mapping.close()
        is_over.append(True)
        working.result(30)

    @pytest.mark.holds("docs/producers.md#from-python", "What a medium or the generator of the jobs raises")
    def test_what_media_raise_is_the_last_and_costs_the_others_nothing(
        self, client: Client, redis: Redis, meanwhile: Callable[..., Any]
    ) -> None:
        def media() -> Iterator[str]:
            yield "s3://photos/1.jpg"
            yield "s3://photos/2.jpg"
            raise OSError("The disk is gone.")

        mapping = meanwhile(lambda: list(client.map("?", media())))
        working = meanwhile(self.answer_all, redis, mapping.done)
        *ends, last = mapping.result(30)
        working.result(30)
        assert [each.answer for each in ends] == ["s3://photos/1.jpg", "s3://photos/2.jpg"]
        assert isinstance(last, InvalidJob)
        assert isinstance(last.__cause__, OSError)

    def test_media_that_can_be_read_once_are_those_of_the_job_that_waited_for_room(
        self, redis: Redis, redis_url: str, meanwhile: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("keye.producer.transport.RETRY_AFTER_SECONDS", 0.05)
        with Client(Settings(redis_url=SecretStr(redis_url), max_queue_depth=2)) as client:
            media = [iter([f"s3://photos/{number}.jpg"]) for number in range(6)]
            mapping = meanwhile(lambda: list(client.map("?", media)))
            working = meanwhile(self.answer_all, redis, mapping.done)
            ends = mapping.result(60)
            working.result(30)
        assert [end.message if isinstance(end, JobFailure) else end.answer for end in ends] == [
            f"s3://photos/{number}.jpg" for number in range(6)
        ]
