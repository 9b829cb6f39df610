"""A job while it runs: text as it is written, frames as they are decoded, and what is left of it when it is stopped.

Through `keye-worker run` as it is started by hand. Its leases are long: nothing here may need a renewal.
"""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from redis import Redis
from typer.testing import CliRunner

from keye.config import keys
from keye.producer import (
    AnalysisJob,
    Client,
    ErrorCode,
    FramesDecoded,
    InvalidJob,
    Job,
    JobEvent,
    JobFailed,
    JobFailure,
    JobResult,
    JobState,
    Stage,
    StageStarted,
    TextGenerated,
)
from keye.producer.cli import app
from keye.worker.demo.embedded_valkey import EmbeddedValkey
from keye.worker.demo.local_worker import SMALL_KEYE, LocalWorker
from keye.worker.demo.scenes import draw_image_scene
from tests.support.zoo import encode_clip, steady_times

ROOT = Path(__file__).resolve().parents[2]
RANDOM_WEIGHTS = ROOT / "tests" / "golden" / "preview" / "checkpoint"
# Greedy, the random weights fall into a loop and go on for longer than any test.
ENDLESS = {"max_new_tokens": 30_000, "temperature": 0}

THOUGHT_ABOUT = AnalysisJob(
    prompt="Count from 40 to 1.", thinking="think", generation={"max_new_tokens": 400, "temperature": 0}
)


@pytest.fixture(scope="module", params=[RANDOM_WEIGHTS], ids=["random"])
def worker_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The broker of a worker that serves the checkpoint."""
    folder = tmp_path_factory.mktemp("worker")
    settings = {
        "KEYE_MODEL_PATH": str(request.param),
        "KEYE_LEASE_SECONDS": "900",
        "KEYE_MEDIA_ROOTS": str(tmp_path_factory.getbasetemp()),
    }
    with EmbeddedValkey() as broker, LocalWorker(broker.url, folder / "worker.log", settings):
        yield broker.url


@pytest.fixture
def client(worker_url: str) -> Iterator[Client]:
    with Client(worker_url) as client:
        yield client


small_keye = pytest.mark.parametrize("worker_url", [SMALL_KEYE], ids=["small"], indirect=True)


def texts(events: Sequence[JobEvent]) -> list[TextGenerated]:
    return [event for event in events if isinstance(event, TextGenerated)]


def joined(events: Sequence[JobEvent], channel: str) -> str:
    return "".join(event.text for event in texts(events) if event.channel == channel)


def follow_and_cancel(job: Job) -> tuple[list[JobEvent], JobFailure]:
    """Cancel at the first text; what was told until the end, and the end."""
    events: list[JobEvent] = []
    for event in job.events(timeout=60):
        if not texts(events) and isinstance(event, TextGenerated):
            job.cancel()
        events.append(event)
    with pytest.raises(JobFailed) as ended:
        job.result(timeout=0)
    return events, ended.value.failure


@pytest.mark.holds("docs/producers.md#while-it-runs", "event | says")
def test_stages_of_a_job_are_told_before_its_text(client: Client) -> None:
    job = client.submit(prompt="go on", generation={"max_new_tokens": 8, "temperature": 0})
    events = list(job.events(timeout=60))
    stages = [event.stage for event in events if isinstance(event, StageStarted)]
    assert stages == [Stage.OPEN, Stage.PREPARE, Stage.GENERATE]
    assert all(isinstance(event, StageStarted) for event in events[:3])


@pytest.mark.holds(
    "docs/producers.md#while-it-runs", "The texts of a channel, joined, are", "The outcome always has all of it."
)
def test_text_comes_in_order_and_joined_is_the_answer(client: Client) -> None:
    job = client.submit(prompt="go on", generation={"max_new_tokens": 1500, "temperature": 0})
    events = list(job.events(timeout=60))
    result = job.result()
    assert joined(events, "answer") == result.answer
    assert joined(events, "reasoning") == (result.reasoning or "")
    written = {"answer": 0, "reasoning": 0}
    for event in texts(events):
        assert event.offset == written[event.channel]
        written[event.channel] += len(event.text)
    told = [event.num_tokens for event in texts(events)]
    assert told == sorted(told)
    assert told[-1] <= result.usage.completion_tokens
    assert len(told) > 1


def test_a_late_reader_is_told_what_was_told_live(client: Client, worker_url: str) -> None:
    job = client.submit(prompt="go on", generation=ENDLESS)
    live, _ = follow_and_cancel(job)
    with Client(worker_url) as late:
        assert list(late.find(job.id).events(timeout=0)) == live


@pytest.mark.holds(
    "docs/producers.md#from-python",
    "A running one is asked to stop",
    "A job that was cancelled or ran out of time while it wrote",
)
def test_a_running_job_that_is_cancelled_stops_at_once_and_keeps_what_was_written(client: Client) -> None:
    job = client.submit(prompt="go on", generation=ENDLESS, metadata={"order": 7})
    events, failure = follow_and_cancel(job)
    assert job.state is JobState.CANCELLED
    assert (failure.code, failure.stage, failure.metadata) == (ErrorCode.CANCELLED, Stage.GENERATE, {"order": 7})
    assert failure.partial is not None
    assert failure.partial.answer == joined(events, "answer")
    assert failure.partial.raw_text
    assert 0 < failure.partial.completion_tokens < 30_000


def test_a_cancel_that_a_worker_could_not_hear_is_found_once_it_listens_again(client: Client, worker_url: str) -> None:
    job = client.submit(prompt="go on", generation=ENDLESS)
    with Redis.from_url(worker_url) as redis:
        for event in job.events(timeout=60):
            if isinstance(event, TextGenerated):
                break
        redis.hset(keys.record(job.id), "cancel_requested", "1")
        redis.client_kill_filter(_type="pubsub")
    with pytest.raises(JobFailed) as ended:
        job.result(timeout=60)
    assert ended.value.code is ErrorCode.CANCELLED


def test_a_job_whose_deadline_passes_keeps_what_was_written(client: Client) -> None:
    job = client.submit(prompt="go on", generation=ENDLESS, deadline_seconds=2)
    with pytest.raises(JobFailed) as ended:
        job.result(timeout=60)
    assert ended.value.code is ErrorCode.DEADLINE_EXCEEDED
    partial = ended.value.failure.partial
    assert partial is not None
    assert partial.answer == joined(list(job.events(timeout=0)), "answer")
    assert partial.completion_tokens > 0


def test_a_job_that_failed_before_it_wrote_has_no_partial_text(client: Client) -> None:
    job = client.submit(prompt="what?", media=["/nowhere/picture.png"])
    with pytest.raises(JobFailed) as ended:
        job.result(timeout=60)
    assert ended.value.failure.partial is None


def test_more_new_tokens_than_the_model_holds_are_refused_before_anything_is_fetched(client: Client) -> None:
    with pytest.raises(InvalidJob, match=r"at least 100002 tokens, .* workers hold 409"):
        client.submit(prompt="what?", media=["/nowhere/picture.png"], generation={"max_new_tokens": 100_000})


def test_decoded_frames_are_told_of(client: Client, tmp_path: Path) -> None:
    clip = encode_clip(tmp_path / "clip.mp4", steady_times(60))
    job = client.submit(prompt="what moves?", media=[str(clip)], generation={"max_new_tokens": 4})
    events = list(job.events(timeout=60))
    (*_, last) = [event for event in events if isinstance(event, FramesDecoded)]
    (seen,) = job.result().media
    assert (last.media_index, last.done, last.total) == (0, seen.frames, seen.frames)


@pytest.mark.holds("docs/producers.md#while-it-runs", "The stream of a job keeps about its 10,000 newest events")
def test_streams_of_events_are_bounded(client: Client, worker_url: str) -> None:
    """A server's own words: appending trims, and the oldest goes first."""
    job = client.submit(prompt="go on", generation=ENDLESS)
    with Redis.from_url(worker_url, decode_responses=True) as redis:
        stream = keys.events(job.id)
        with redis.pipeline() as filling:
            for number in range(12_000):
                filling.xadd(stream, {"event": f'{{"type":"stage","stage":"queued","attempt":0,"at":{number}}}'})
            filling.execute()
        # Text may come before the stream was filled; the first that comes after it trims.
        for event in job.events(timeout=60):
            if isinstance(event, TextGenerated) and redis.xlen(stream) < 10_500:
                break
        assert redis.xlen(stream) < 10_500
        job.cancel()
        with pytest.raises(JobFailed):
            job.result(timeout=60)


@small_keye
def test_reasoning_is_told_apart_from_the_answer_while_the_model_thinks(client: Client) -> None:
    job = client.submit(THOUGHT_ABOUT)
    events = list(job.events(timeout=60))
    result = job.result()
    assert result.raw_text.startswith("<think>")
    assert result.reasoning
    assert result.answer
    assert (joined(events, "reasoning"), joined(events, "answer")) == (result.reasoning, result.answer)
    channels = [event.channel for event in texts(events)]
    assert channels == sorted(channels, reverse=True), "reasoning comes first"
    assert not any(bracket in event.text for event in texts(events) for bracket in "<>")


@pytest.fixture
def picture(tmp_path: Path) -> str:
    draw_image_scene(np.random.default_rng(1), num_shapes=3).image.save(tmp_path / "shapes.png")
    return str(tmp_path / "shapes.png")


@pytest.mark.holds(
    "docs/producers.md#whether-it-thinks-first",
    "`thinking` is `auto` (the model decides)",
    "What it writes comes in parts",
    "What it did not write of the first two is None; `raw_text` has all of it",
)
@small_keye
def test_the_sentence_in_which_the_model_decides_to_think_is_told_apart_from_what_it_thinks(
    client: Client, worker_url: str, picture: str
) -> None:
    job = client.submit(prompt="What is in the image?", media=[picture], generation={"temperature": 0})
    events = list(job.events(timeout=60))
    result = job.result()
    assert result.analysis == "I have to look closely, so I use /think."
    assert result.reasoning
    assert result.raw_text == (
        f"<analysis>{result.analysis}</analysis><think>{result.reasoning}</think><answer>{result.answer}</answer>"
    )
    asked = {"prompt": "What is in the image?", "media": [picture], "generation": {"temperature": 0}}
    plain = client.submit(asked | {"thinking": "no_think"}).result(timeout=60)
    assert (plain.analysis, plain.reasoning, plain.answer) == (None, None, plain.raw_text)
    for channel in ("analysis", "reasoning", "answer"):
        assert joined(events, channel) == getattr(result, channel)
        assert next(event.offset for event in texts(events) if event.channel == channel) == 0
    shown = CliRunner().invoke(app, ["watch", job.id, "--redis-url", worker_url]).stdout
    assert f"\n\n{result.analysis}\n\n{result.reasoning}\n\n{result.answer}\n\n" in shown


@pytest.mark.holds(
    "docs/producers.md#whether-it-thinks-first",
    "is the most tokens that it may think",
    "its thinking is closed and the answer begun for it",
)
@pytest.mark.parametrize("question", ["What is in the image?", "图里有什么？"])  # noqa: RUF001
@small_keye
def test_a_job_says_how_long_its_thinking_may_be_and_is_replayed_with_it(
    client: Client, worker_url: str, picture: str, question: str
) -> None:
    def keye(*arguments: str) -> str:
        return CliRunner().invoke(app, [*arguments, "--redis-url", worker_url]).stdout

    asked = ("submit", question, picture, "--thinking", "think", "--wait", "--json", "--max-new-tokens", "200")
    free = JobResult.model_validate_json(keye(*asked))
    capped = JobResult.model_validate_json(keye(*asked, "--max-thinking-tokens", "4"))
    assert free.reasoning
    assert capped.reasoning
    assert free.reasoning.startswith(capped.reasoning)
    assert len(capped.reasoning) < len(free.reasoning)
    assert capped.raw_text == f"<think>{capped.reasoning}</think><answer>{capped.answer}</answer>"
    assert capped.answer
    assert capped.warnings == ("Thinking was ended after 4 tokens (max_thinking_tokens).",)
    assert free.warnings == ()
    events = list(client.find(capped.job_id).events(timeout=0))
    assert (joined(events, "reasoning"), joined(events, "answer")) == (capped.reasoning, capped.answer)
    told = [result.generation and result.generation.max_thinking_tokens for result in (free, capped)]
    assert told == [None, 4]
    assert keye("replay", capped.job_id) == "the same: media, model, generation and text\n"


@small_keye
def test_keye_watch_shows_stages_and_the_text(client: Client, worker_url: str) -> None:
    job = client.submit(THOUGHT_ABOUT)
    shown = CliRunner().invoke(app, ["watch", job.id, "--redis-url", worker_url]).stdout
    result = job.result()
    assert f"generate (attempt 1)\n\n{result.reasoning}\n\n{result.answer}\n\n" in shown
    assert f"SUCCEEDED\n{result.usage.completion_tokens} tokens in " in shown


@pytest.mark.holds("docs/producers.md#while-it-runs", "`examples/stream_answer.py` is a whole program")
@small_keye
def test_the_example_prints_the_answer_as_it_is_written(client: Client, worker_url: str) -> None:
    program = [sys.executable, str(ROOT / "examples" / "stream_answer.py"), "Count from 30 to 1."]
    environment = {"KEYE_REDIS_URL": worker_url}
    said = subprocess.run(program, capture_output=True, text=True, timeout=60, env=environment, check=True)
    job_id = said.stderr.splitlines()[0].removeprefix("job ")
    assert said.stdout.strip() == client.find(job_id).result(timeout=0).answer
    assert "[generate, attempt 1]" in said.stderr
