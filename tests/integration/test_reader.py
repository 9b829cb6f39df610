"""The reader that all who wait in a process share: what spoils one caller's job costs the others nothing."""

import random
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
from redis import Redis

from keye.config import keys
from keye.producer import (
    Client,
    Heartbeat,
    InvalidEventId,
    Job,
    JobEnded,
    JobNotEnded,
    JobNotFound,
    JobUnreadable,
    QueueUnavailable,
    TextGenerated,
    reader,
)
from keye.producer.following import EventsFollowing
from tests.support.conditions import eventually
from tests.support.worker_side import JOB, answer, settle, start

LAST_ID = f"{2**64 - 1}-{2**64 - 2}"


def write(redis: Redis, job: Job, text: str) -> None:
    event = TextGenerated(channel="answer", text=text, offset=0, num_tokens=1, attempt=1, at=time.time())
    redis.xadd(keys.events(job.id), {"event": event.model_dump_json()})


def end(redis: Redis, job: Job, **fields: Any) -> None:
    redis.hset(keys.record(job.id), mapping={"state": "SUCCEEDED", "outcome": "{}", **fields})
    redis.xadd(keys.events(job.id), {"event": JobEnded(state="SUCCEEDED", at=0).model_dump_json()})


# What strangers, other releases and accidents leave of one job, and what whoever waits for it hears.
SPOILED: dict[str, tuple[Callable[[Redis, Job], object], type[Exception] | None]] = {
    "a string for a record": (lambda r, job: r.set(keys.record(job.id), "x"), QueueUnavailable),
    "a string for a stream": (lambda r, job: r.set(keys.events(job.id), "x"), QueueUnavailable),
    "no record": (lambda r, job: r.delete(keys.record(job.id)), JobNotFound),
    "an unknown state": (lambda r, job: r.hset(keys.record(job.id), "state", "PAUSED"), JobNotEnded),
    "an unknown last state": (lambda r, job: end(r, job, state="REFUSED", outcome=answer(job).model_dump_json()), None),
    "a deadline that is no number": (lambda r, job: r.hset(keys.record(job.id), "deadline_at", "soon"), JobNotEnded),
    "an outcome that is no JSON": (lambda r, job: end(r, job, outcome="{"), JobUnreadable),
    "an outcome of no kind": (lambda r, job: end(r, job, outcome='{"kind": "rumour"}'), JobUnreadable),
    "an end without an outcome": (lambda r, job: end(r, job, outcome=""), JobUnreadable),
    "a record that is no text": (lambda r, job: end(r, job, outcome=b'{"kind": "\xff"}'), JobUnreadable),
    "an event that is no JSON": (lambda r, job: r.xadd(keys.events(job.id), {"event": "{"}), JobNotEnded),
    "an event that is no text": (lambda r, job: r.xadd(keys.events(job.id), {"event": b"\xff"}), JobNotEnded),
    "an entry that is no event": (lambda r, job: r.xadd(keys.events(job.id), {b"\xfe": "x"}), JobNotEnded),
    "the last id there is": (lambda r, job: r.xadd(keys.events(job.id), {"event": "{}"}, LAST_ID), JobNotEnded),
}


@pytest.mark.holds("docs/producers.md#what-can-be-raised", "wrote an outcome or a record that this one cannot read")
@pytest.mark.parametrize("is_waited_for", [False, True], ids=["before", "while waited for"])
@pytest.mark.parametrize("what", SPOILED)
def test_what_spoils_one_job_is_told_to_who_waits_for_it_and_to_nobody_else(
    client: Client, redis: Redis, meanwhile: Callable[..., Any], what: str, is_waited_for: bool
) -> None:
    spoil, told = SPOILED[what]
    good, bad = client.submit(JOB), client.submit(JOB)
    if not is_waited_for:
        spoil(redis, bad)
    neighbours = [meanwhile(good.result, 60), meanwhile(list, good.events(60))]
    patience = 1 if told is JobNotEnded else 60
    waiting = [meanwhile(bad.result, patience), meanwhile(list, bad.events(patience))]
    if is_waited_for:
        eventually(lambda: client._transport.reader._is_reading)
        spoil(redis, bad)
    for each in waiting:
        if told in (None, JobUnreadable):
            eventually(each.done)
        else:
            with pytest.raises(told):
                each.result(30)
    if told is JobUnreadable:
        with pytest.raises(JobUnreadable, match=bad.id):
            waiting[0].result()
    assert not any(each.done() for each in neighbours)
    settle(redis, good, answer(good))
    assert neighbours[0].result(10).answer == "a red square"
    assert isinstance(neighbours[1].result(10)[-1], JobEnded)
    with pytest.raises(JobNotEnded):
        client.submit(JOB).result(timeout=0)


@pytest.mark.parametrize("job_id", ["", " ", "a b\r\nQUIT\r\n", "\ud800", "\0", "*", "x:events", "ж" * 500, "{}"])
def test_an_id_that_can_be_none_is_that_of_no_job(client: Client, redis: Redis, job_id: str) -> None:
    good = client.submit(JOB)
    settle(redis, good, answer(good))
    ends = {getattr(job, "id", job): end for job, end in client.results([job_id, good.id], timeout=5)}
    assert isinstance(ends.pop(job_id), JobNotFound)
    assert ends[good.id] == answer(good)
    with pytest.raises(JobNotFound):
        client.find(job_id)
    with pytest.raises(JobNotFound):
        list(client.job(job_id).events(timeout=5))


def test_ten_thousand_ids_are_looked_at_in_bulk(client: Client, redis: Redis) -> None:
    jobs = client.submit_many([JOB] * 300)
    for job in jobs:
        settle(redis, job, answer(job, job.id))
    redis.config_resetstat()
    answers, missing = [], 0
    for job, found in client.results([*jobs, *map(str, range(9_700))], timeout=30):
        if isinstance(found, JobNotFound):
            missing += 1
        else:
            answers.append((job.id, found.answer))
    assert (sorted(answers), missing) == (sorted((job.id, job.id) for job in jobs), 9_700)
    calls = redis.info("commandstats")
    assert calls["cmdstat_hmget"]["calls"] == 10_000
    assert calls.get("cmdstat_xread", {"calls": 0})["calls"] < 50


@pytest.mark.parametrize("after", [f"{2**64}-0", f"0-{2**64}", "9" * 20])
def test_an_id_beyond_all_is_refused(client: Client, after: str) -> None:
    with pytest.raises(InvalidEventId):
        client.submit(JOB).events(after=after)


@pytest.mark.parametrize("after", [LAST_ID, str(2**64 - 1)])
def test_who_goes_on_behind_the_last_id_there_is_hears_of_the_end_all_the_same(
    client: Client, redis: Redis, meanwhile: Callable[..., Any], after: str
) -> None:
    job = client.submit(JOB)
    following = meanwhile(list, job.events(30, after=after))
    settle(redis, job, answer(job))
    assert following.result(20) == []


@pytest.mark.parametrize(
    "options",
    [
        {"timeout": float("nan")},
        {"heartbeat_seconds": 0},
        {"heartbeat_seconds": -1},
        {"heartbeat_seconds": float("nan")},
    ],
)
def test_seconds_that_would_never_end_or_never_wait_are_refused(client: Client, options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="give seconds"):
        next(client.submit(JOB).events(**options))


@pytest.mark.parametrize("timeout", [float("inf"), 1e300, 1e10])
def test_a_patience_without_end_is_one(
    client: Client, redis: Redis, meanwhile: Callable[..., Any], timeout: float
) -> None:
    job = client.submit(JOB)
    waiting = [meanwhile(job.result, timeout), meanwhile(list, job.events(timeout, None, timeout))]
    eventually(lambda: client._transport.reader._is_reading)
    settle(redis, job, answer(job))
    assert waiting[0].result(20).answer == "a red square"
    assert len(waiting[1].result(20)) == 1


@pytest.mark.parametrize("timeout", [0, -1, 1e-9, float("-inf")])
def test_who_has_no_patience_hears_what_is_there(client: Client, redis: Redis, timeout: float) -> None:
    ended, job = client.submit(JOB), client.submit(JOB)
    settle(redis, ended, answer(ended))
    start(redis, job)
    assert ended.result(timeout).answer == "a red square"
    events = job.events(timeout)
    assert next(events).type == "stage"
    with pytest.raises(JobNotEnded, match="RUNNING"):
        next(events)


def test_who_keeps_a_story_waiting_keeps_nobody_else_and_misses_nothing(
    client: Client, redis: Redis, meanwhile: Callable[..., Any]
) -> None:
    story, other = client.submit(JOB), client.submit(JOB)
    for number in range(300):
        write(redis, story, f"{number} ")
    events = story.events(60)
    heard = [next(events)]
    (following,) = client._transport.reader._followings
    eventually(lambda: following.is_full)
    waiting = meanwhile(other.result, 60)
    settle(redis, other, answer(other))
    assert waiting.result(20).answer == "a red square"
    assert len(following._items) < 200
    settle(redis, story, answer(story))
    heard += events
    assert "".join(e.text for e in heard if isinstance(e, TextGenerated)).split() == [str(n) for n in range(300)]


def test_whoever_comes_and_goes_hears_all_from_where_he_began(
    client: Client, redis: Redis, meanwhile: Callable[..., Any]
) -> None:
    jobs = client.submit_many([JOB] * 6)
    is_over = threading.Event()

    def work() -> None:
        for number in range(150):
            for job in jobs:
                write(redis, job, f"{number} ")
        for job in jobs:
            settle(redis, job, answer(job))
        is_over.set()

    def follow(seed: int) -> None:
        draw = random.Random(seed)
        while not is_over.is_set():
            job, after, heard = draw.choice(jobs), None, []
            while not heard or not isinstance(heard[-1], JobEnded):
                for event in job.events(60, after=after):
                    heard.append(event)
                    after = event.id
                    if draw.random() < 0.02:
                        break
            texts = "".join(event.text for event in heard if isinstance(event, TextGenerated))
            assert texts.split() == [str(number) for number in range(150)]

    following = [meanwhile(follow, seed) for seed in range(12)]
    meanwhile(work).result(60)
    for each in following:
        each.result(60)


def test_an_end_is_never_missed_however_closely_it_follows(
    client: Client, redis: Redis, meanwhile: Callable[..., Any]
) -> None:
    for _ in range(150):
        jobs = client.submit_many([JOB] * 8)
        waiting = [meanwhile(job.result, random.choice([60, None])) for job in jobs[:4]]
        waiting += [meanwhile(lambda job=job: list(job.events(60))) for job in jobs[4:]]
        for job in jobs:
            settle(redis, job, answer(job))
        assert [each.result(60).answer for each in waiting[:4]] == ["a red square"] * 4
        assert [type(each.result(60)[-1]) for each in waiting[4:]] == [JobEnded] * 4


def test_a_patience_that_ends_as_the_job_does_hears_one_of_both(client: Client, redis: Redis) -> None:
    for number in range(300):
        job = client.submit(JOB)
        ending = threading.Thread(target=settle, args=(redis, job, answer(job)))
        ending.start()
        try:
            assert job.result(timeout=number / 1e5).answer == "a red square"
        except JobNotEnded:
            ending.join()
            assert job.result(timeout=0).answer == "a red square"
        ending.join()


def test_heartbeats_do_not_hold_up_events(client: Client, redis: Redis, meanwhile: Callable[..., Any]) -> None:
    job = client.submit(JOB)
    events = job.events(60, heartbeat_seconds=0.01)
    assert isinstance(next(events), Heartbeat)
    following = meanwhile(list, events)
    for number in range(50):
        write(redis, job, f"{number} ")
    settle(redis, job, answer(job))
    heard = [event for event in following.result(30) if not isinstance(event, Heartbeat)]
    assert len(heard) == 51
    assert isinstance(heard[-1], JobEnded)


def test_a_job_that_is_sent_again_under_its_id_is_waited_for_anew(
    client: Client, redis: Redis, meanwhile: Callable[..., Any]
) -> None:
    job = client.submit(JOB)
    record = redis.hgetall(keys.record(job.id))
    write(redis, job, "old")
    waiting = meanwhile(job.result, 60)
    eventually(lambda: client._transport.reader._is_reading)
    with redis.pipeline() as move:
        move.delete(keys.record(job.id), keys.events(job.id))
        move.hset(keys.record(job.id), mapping=record)
        move.execute()
    settle(redis, job, answer(job, "new"))
    assert waiting.result(20).answer == "new"


def test_an_ended_job_whose_events_are_gone_has_none(client: Client, redis: Redis) -> None:
    job = client.submit(JOB)
    settle(redis, job, answer(job))
    redis.delete(keys.events(job.id))
    assert list(job.events(5)) == []


def test_one_error_for_many_grows_with_none_of_them(client: Client, meanwhile: Callable[..., Any]) -> None:
    job = client.submit(JOB)
    waiting = [meanwhile(job.result) for _ in range(50)]
    eventually(lambda: len(client._transport.reader._followings) == 50)
    client.close()
    errors = [each.exception(20) for each in waiting]
    assert {type(error) for error in errors} == {QueueUnavailable}

    def depth(error: BaseException | None) -> int:
        frames, place = 0, error.__traceback__ if error else None
        while place:
            frames, place = frames + 1, place.tb_next
        return frames

    assert max(map(depth, errors)) < 10


def test_who_looks_just_as_his_last_item_comes_does_not_leave_without_it() -> None:
    following = EventsFollowing("7", "0-0", lambda: None, None, None)

    class Items(deque[Any]):
        def extend(self, items: Any) -> None:
            assert not following.is_over
            super().extend(items)

    following._items = Items()
    (place,) = following.places.values()
    following.fail(place, JobNotFound.of("7"))
    assert not following.is_over
    with pytest.raises(JobNotFound):
        following.take()
    assert following.is_over


def test_a_process_that_can_begin_no_more_threads_does_not_read_twice(
    client: Client, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    begin = reader._start

    def refuse_the_second(name: str, run: Callable[[], object]) -> threading.Thread:
        started.append(name)
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        return begin(name, run)

    monkeypatch.setattr(reader, "_start", refuse_the_second)
    job = client.submit(JOB)
    with pytest.raises(RuntimeError, match="new thread"):
        job.result(timeout=0)
    assert client._transport.reader._followings == set()
    settle(redis, job, answer(job))
    assert job.result(timeout=30).answer == "a red square"
    # Two would go on for ten seconds; that of the test before may be about to end.
    eventually(lambda: [thread.name for thread in threading.enumerate()].count("keye-reader") == 1, within_seconds=5)
