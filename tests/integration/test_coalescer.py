"""Generated text on a real stream: in few events, in order, and whole even where the server was full meanwhile."""

import time
from collections.abc import Callable, Iterator

import pytest
from redis import Redis

from keye.config import keys
from keye.config.codes import Stage
from keye.config.connection import connect
from keye.config.event import EVENT, StageStarted, TextGenerated
from keye.config.job import AnalysisJob
from keye.config.outcome import JobFailure
from keye.config.wire import seal
from keye.worker.leases.claims import Claimed, QueuedJob
from keye.worker.leases.job_lease import LeaseStore
from keye.worker.results.event_writer import MAX_WAIT_SECONDS, MAX_WAITING_TOKENS, AttemptEvents, Coalescer, EventWriter
from keye.worker.results.settlement import Settlement
from tests.support.conditions import eventually

Told = Callable[[], list[tuple[str, str, int, int]]]


@pytest.fixture
def client(redis_url: str) -> Iterator[Redis]:
    with connect(redis_url) as client:
        yield client


@pytest.fixture
def lease(client: Redis) -> Claimed:
    claimed = LeaseStore(client, lease_seconds=30).claim(QueuedJob.of(seal(AnalysisJob(prompt="?"))), "worker")
    assert isinstance(claimed, Claimed)
    return claimed


@pytest.fixture
def said(client: Redis, lease: Claimed) -> AttemptEvents:
    return AttemptEvents(EventWriter(client), lease)


@pytest.fixture
def coalescer(said: AttemptEvents) -> Coalescer:
    return Coalescer(said)


@pytest.fixture
def told(redis: Redis, lease: Claimed) -> Told:
    """Channel, text, offset and number of tokens of each text event so far."""

    def look() -> list[tuple[str, str, int, int]]:
        events = (EVENT.validate_json(fields["event"]) for _, fields in redis.xrange(keys.events(lease.job_id)))
        return [(e.channel, e.text, e.offset, e.num_tokens) for e in events if isinstance(e, TextGenerated)]

    return look


def test_the_first_text_is_told_at_once_and_the_next_waits_for_company(
    coalescer: Coalescer, told: Told, said: AttemptEvents
) -> None:
    coalescer.push("A", 1)
    assert told() == [("answer", "A", 0, 1)]
    for letter in "bcd":
        coalescer.push(letter, 1)
    assert len(told()) == 1
    coalescer.flush()
    said.flush()
    assert told() == [("answer", "A", 0, 1), ("answer", "bcd", 1, 4)]


def test_of_many_answers_side_by_side_each_tells_its_text_less_often(said: AttemptEvents, told: Told) -> None:
    alone, one_of_many = Coalescer(said, question=0), Coalescer(said, question=1, num_answers=8000)
    for each in (alone, one_of_many):
        each.push("A", 1)
    begun_at = time.monotonic()
    eventually(lambda: time.monotonic() - begun_at > MAX_WAIT_SECONDS)
    one_of_many.push("b", 1)
    assert [text for _, text, _, _ in told()] == ["A", "A"]
    alone.push("b", 1)
    assert [text for _, text, _, _ in told()] == ["A", "A", "b"]


@pytest.mark.holds("docs/producers.md#while-it-runs", "or every 32 tokens, whichever is first")
def test_many_tokens_do_not_wait(coalescer: Coalescer, told: Told) -> None:
    coalescer.push("A", 1)
    coalescer.push("b", MAX_WAITING_TOKENS)
    assert len(told()) == 2


@pytest.mark.holds("docs/producers.md#while-it-runs", "They come every tenth of a second")
def test_text_does_not_wait_long(coalescer: Coalescer, told: Told) -> None:
    coalescer.push("A", 1)
    eventually(lambda: coalescer.push("b", 0) or len(told()) > 1)
    assert told()[1][2] == 1


@pytest.mark.holds("docs/producers.md#while-it-runs", "the last text with the end")
def test_the_last_text_is_told_with_the_end_of_the_job(
    client: Redis, coalescer: Coalescer, said: AttemptEvents, lease: Claimed, redis: Redis
) -> None:
    said.tell(StageStarted, may_wait=True, stage=Stage.GENERATE)
    coalescer.push("A", 1, is_last=True)
    coalescer.flush()
    assert redis.xlen(keys.events(lease.job_id)) == 1, "the claim's"
    failure = JobFailure(
        job_id=lease.job_id, code="INTERNAL", message="?", stage="generate", retryable=False, attempts=1
    )
    Settlement(client, 3600, 9000).settle(lease, failure, last_events=said.unwritten)
    events = [EVENT.validate_json(fields["event"]).type for _, fields in redis.xrange(keys.events(lease.job_id))]
    assert events == ["stage", "stage", "text", "ended"]


def test_each_channel_has_its_own_events_and_its_own_offsets(
    coalescer: Coalescer, told: Told, said: AttemptEvents
) -> None:
    coalescer.push("<analysis>Easy.</analysis><answer>red</answer>", 9)
    coalescer.push("<think>No", 2)
    coalescer.flush()
    said.flush()
    assert told() == [("analysis", "Easy.", 0, 9), ("answer", "red", 0, 9), ("reasoning", "No", 0, 11)]


def test_text_that_a_full_server_refused_is_told_later(
    coalescer: Coalescer, told: Told, redis: Redis, said: AttemptEvents
) -> None:
    coalescer.push("A", 1)
    redis.config_set("maxmemory", 1)
    try:
        coalescer.push("b", MAX_WAITING_TOKENS)
        coalescer.push("c", MAX_WAITING_TOKENS)
    finally:
        redis.config_set("maxmemory", 0)
    eventually(lambda: coalescer.push("", 0) or len(told()) > 1)
    coalescer.flush()
    said.flush()
    assert "".join(text for _, text, _, _ in told()) == "Abc"
    assert told()[1][2] == 1
