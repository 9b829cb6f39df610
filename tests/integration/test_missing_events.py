"""A job says more than its stream keeps: who comes late, is slow or comes back hears how many events are gone."""

import asyncio
import json
from itertools import islice

import pytest
from redis import Redis
from typer.testing import CliRunner

from keye.config import keys
from keye.config.event import EventsMissing, StageStarted, TextGenerated
from keye.producer import AsyncClient, Client, Job, transport
from keye.producer.cli import app
from keye.worker.results.event_writer import MAX_EVENTS
from tests.support.conditions import eventually
from tests.support.worker_side import JOB, answer, settle, start

CHATTER = 300


def say(redis: Redis, job: Job, first: int, number: int) -> None:
    with redis.pipeline(transaction=False) as saying:
        for place in range(first, first + number):
            text = TextGenerated(channel="answer", text="a", offset=place, num_tokens=1, attempt=1, at=0)
            saying.xadd(keys.events(job.id), {"event": text.model_dump_json()}, maxlen=MAX_EVENTS, approximate=True)
        saying.execute()


@pytest.fixture
def job(client: Client, redis: Redis) -> Job:
    """Running, with a first event and `CHATTER` texts."""
    job = client.submit(JOB)
    start(redis, job)
    say(redis, job, 0, CHATTER)
    return job


def is_whole(events: list[object]) -> bool:
    return not any(isinstance(event, EventsMissing) for event in events)


@pytest.mark.holds("docs/producers.md#while-it-runs", "Where some are gone that a reader has not seen")
def test_who_comes_late_hears_exactly_how_many_he_missed_and_reads_the_rest(redis: Redis, job: Job) -> None:
    redis.xtrim(keys.events(job.id), maxlen=100, approximate=False)
    settle(redis, job, answer(job))
    missing, *rest = job.events(timeout=30)
    assert isinstance(missing, EventsMissing)
    assert missing.num_missing == 1 + CHATTER - 100
    assert [event.offset for event in rest if isinstance(event, TextGenerated)] == list(range(CHATTER - 100, CHATTER))
    assert is_whole(rest)
    again, *_ = job.events(timeout=30, after=missing.id)
    assert again.model_dump(exclude={"at"}) == missing.model_dump(exclude={"at"}), "its id goes on where it was"


def test_a_very_long_answer_itself_tells_its_late_reader(redis: Redis, job: Job) -> None:
    say(redis, job, CHATTER, MAX_EVENTS + 1000)
    settle(redis, job, answer(job))
    missing, first, *_ = job.events(timeout=30)
    assert isinstance(missing, EventsMissing)
    assert isinstance(first, TextGenerated)
    assert missing.num_missing == first.offset + 1, "all texts before it, and the stage"


def test_who_is_slow_hears_exactly_how_many_were_dropped_before_he_read_them(
    client: Client, redis: Redis, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("keye.producer.reader.LOOK_SECONDS", 0.0)
    events = job.events(timeout=30)
    heard: list[object] = [next(events)]
    (following,) = client._transport.reader._followings
    eventually(lambda: following.is_full)
    redis.xtrim(keys.events(job.id), maxlen=10, approximate=False)
    settle(redis, job, answer(job))
    heard += events
    (missing,) = (event for event in heard if isinstance(event, EventsMissing))
    assert missing.num_missing == 1 + CHATTER - 10 - heard.index(missing)
    assert len(heard) - 1 + (missing.num_missing or 0) == 1 + CHATTER + 1


def test_who_comes_back_hears_how_many_it_may_be_at_the_most(redis: Redis, job: Job) -> None:
    seen = list(islice(job.events(timeout=30), 50))[-1]
    redis.xtrim(keys.events(job.id), maxlen=100, approximate=False)
    settle(redis, job, answer(job))
    missing, *rest = job.events(timeout=30, after=seen.id)
    assert isinstance(missing, EventsMissing)
    assert missing.num_missing == 1 + CHATTER - 100
    assert missing.id == seen.id
    newest = [event for event in rest if isinstance(event, TextGenerated)][-1]
    assert is_whole(list(job.events(timeout=30, after=newest.id)))


def test_of_a_server_before_7_0_it_is_known_only_that_some_are_gone(
    redis: Redis, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None is to be had here: what it does not tell is left out."""
    monkeypatch.setattr(transport, "_gone", lambda stream, gone=transport._gone: gone(_as_of_6_2(stream)))
    assert is_whole(list(islice(job.events(timeout=30), 50)))
    redis.xtrim(keys.events(job.id), maxlen=100, approximate=False)
    settle(redis, job, answer(job))
    events = list(job.events(timeout=30))
    assert [event.num_missing for event in events if isinstance(event, EventsMissing)] == [None]


def _as_of_6_2(stream: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in stream.items() if name != "entries-added"}


def test_asyncio_hears_the_same(redis: Redis, redis_url: str, job: Job) -> None:
    redis.xtrim(keys.events(job.id), maxlen=100, approximate=False)
    settle(redis, job, answer(job))

    async def read() -> list[object]:
        async with AsyncClient(redis_url) as client:
            return [event async for event in (await client.find(job.id)).events(timeout=30)]

    events = asyncio.run(read())
    assert [event.num_missing for event in events if isinstance(event, EventsMissing)] == [1 + CHATTER - 100]


@pytest.mark.holds("docs/stream-to-a-browser.md#what-does-the-page-do", "An event of the type `missing` stands where")
def test_keye_watch_tells_it(redis: Redis, redis_url: str, job: Job) -> None:
    redis.xtrim(keys.events(job.id), maxlen=100, approximate=False)
    settle(redis, job, answer(job))
    shown = CliRunner().invoke(app, ["watch", job.id, "--redis-url", redis_url]).stdout
    assert f"{1 + CHATTER - 100} events are missing" in shown
    (first, *_) = CliRunner().invoke(app, ["watch", job.id, "--json", "--redis-url", redis_url]).stdout.splitlines()
    told = json.loads(first)
    assert (told["type"], told["num_missing"]) == ("missing", 1 + CHATTER - 100)


def test_nothing_is_missing_of_a_stream_that_is_whole(redis: Redis, job: Job) -> None:
    settle(redis, job, answer(job))
    events = list(job.events(timeout=30))
    assert is_whole(events)
    assert isinstance(events[0], StageStarted)
