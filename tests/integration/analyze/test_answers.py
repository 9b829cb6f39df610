"""What a job that is answered tells its caller, by its result, its events and Celery."""

import hashlib

import pytest

from keye.config.codes import JobState, Stage
from keye.config.event import JobEnded, StageStarted
from keye.config.job import Priority, VideoPart
from keye.config.outcome import JobResult
from keye.config.wire import SealedJob, seal
from keye.worker.engine.sequence import SECONDS_A_PRIORITY
from tests.integration.analyze.plant import FaultyInbox, Plant, a_job, briefly
from tests.support.zoo import encode_clip, steady_times


def test_image_job_ends_with_a_result_that_tells_how_it_came_about(plant: Plant, picture: str) -> None:
    job = plant.client.submit(
        prompt="what?", media=[picture], generation=briefly(), metadata={"order": 7}, thinking="no_think"
    )
    result = plant.finish(job)

    assert job.state is JobState.SUCCEEDED
    assert result.attempts == 1
    assert result.metadata == {"order": 7}
    assert result.model.name == "random"
    (seen,) = result.media
    assert (seen.type, seen.original_size, seen.resized_size) == ("image", (90, 120), (84, 112))
    assert seen.visual_tokens == result.usage.visual_tokens == 12
    assert 12 < result.usage.prompt_tokens < 100
    assert 1 <= result.usage.completion_tokens <= 6
    timings = result.timings
    assert 0 < timings.fetch + timings.decode + timings.prepare + timings.generate <= timings.total
    assert timings.first_token is not None


@pytest.mark.holds(
    "docs/operations.md#was-that-really-what-the-model-saw", "`generation` has what the job left open too"
)
@pytest.mark.holds("docs/operations.md#was-that-really-what-the-model-saw", "is when each frame that was read is shown")
def test_video_job_tells_when_its_frames_are_shown_and_how_its_text_was_made(plant: Plant) -> None:
    times = [number * number / 30 for number in range(12)]
    clip = encode_clip(plant.media / "slower.mp4", times)
    part = VideoPart(uri=str(clip), fps=60, max_frames=4096, digest=True)
    result = plant.finish(plant.client.submit(prompt="what?", media=[part], generation={"max_new_tokens": 2}))
    (seen,) = result.media
    assert set(seen.frame_times_seconds) <= set(times)
    assert len(set(seen.frame_times_seconds)) > 5
    assert len(seen.frame_times_seconds) == seen.frames
    assert (seen.sha256, seen.num_bytes) == (hashlib.sha256(clip.read_bytes()).hexdigest(), clip.stat().st_size)
    assert (seen.content, seen.sampling) == (None, "even")
    made = result.generation
    assert (made.max_new_tokens, made.thinking) == (2, "auto")
    assert 0 <= made.seed < 2**53
    again = plant.finish(plant.client.submit(prompt="what?", media=[part], generation={"max_new_tokens": 2, "seed": 7}))
    assert again.generation.seed == 7
    assert again.generation == made.model_copy(update={"seed": 7})


@pytest.mark.holds(
    "docs/celery.md#send-a-job-wait-for-its-answer",
    "The result is the outcome",
)
@pytest.mark.holds(
    "docs/design.md#one-job-walked",
    "which writes the Celery result for plain `AsyncResult` readers too",
)
def test_celery_result_is_the_outcome_for_who_knows_celery_only(plant: Plant) -> None:
    job = plant.client.submit(a_job())
    result = plant.finish(job)
    assert JobResult.model_validate(plant.celery_result(job.id).get(timeout=10)) == result


@pytest.mark.holds("docs/design.md#one-job-walked", "decode, in a child")
def test_events_tell_the_stages_in_order(plant: Plant, picture: str) -> None:
    job = plant.client.submit(prompt="what?", media=[picture], generation=briefly())
    *told, last = job.events(timeout=60)
    assert [event.stage for event in told if isinstance(event, StageStarted)] == [
        Stage.OPEN,
        Stage.FETCH,
        Stage.DECODE,
        Stage.PREPARE,
        Stage.GENERATE,
    ]
    assert isinstance(last, JobEnded)
    assert last.state is JobState.SUCCEEDED


def test_video_is_sampled_and_told_of(plant: Plant, picture: str) -> None:
    clip = encode_clip(plant.media / "clip.mp4", steady_times(60))
    job = plant.client.submit(prompt="what moves?", media=[picture, str(clip), picture], generation=briefly())
    seen = plant.finish(job).media

    assert [medium.type for medium in seen] == ["image", "video", "image"]
    assert seen[1].frames == 4
    assert seen[1].fps == pytest.approx(2, rel=0.05)
    assert seen[1].duration_seconds == pytest.approx(2, rel=0.05)
    height, width = seen[1].resized_size
    assert seen[1].visual_tokens == 4 * height * width // 28**2


def test_chat_with_several_turns_and_media_is_read_whole(plant: Plant, picture: str) -> None:
    turns = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "image", "uri": picture}, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": "teal"},
        {"role": "user", "content": [{"type": "text", "text": "sure?"}]},
    ]
    result = plant.finish(plant.client.submit(messages=turns, generation=briefly()))
    assert len(result.media) == 1


def test_same_seed_gives_the_same_text(plant: Plant) -> None:
    options = {"max_new_tokens": 12, "temperature": 1.5, "seed": 5}
    first, second = (plant.finish(plant.client.submit(prompt="sing", generation=options)) for _ in range(2))
    assert first.raw_text == second.raw_text


def test_job_published_without_a_record_is_answered_and_gets_one(plant: Plant) -> None:
    sealed = seal(a_job())
    result = plant.send(sealed.model_dump(mode="json"), sealed.job_id).get(timeout=20)
    assert JobResult.model_validate(result) == plant.finish(plant.client.find(sealed.job_id))
    assert SealedJob.model_validate_json(plant.record(sealed.job_id)["sealed"]) == sealed


@pytest.mark.holds(
    "docs/scaling.md#how-many-gpus-that-is",
    "Workers do not talk to",
)
def test_worker_does_not_gossip_however_it_is_started(plant: Plant) -> None:
    started = {type(step).__name__ for step in plant.worker.consumer.steps}
    assert "Tasks" in started
    assert not started & {"Gossip", "Mingle", "Heart"}


@pytest.mark.holds(
    "docs/design.md#one-job-walked",
    "each level of priority counts as if the job had come ten seconds later",
)
def test_each_step_of_priority_is_ten_seconds_in_the_engine(plant: Plant) -> None:
    for priority in Priority:
        plant.finish(plant.client.submit(a_job(priority=priority)))
    assert isinstance(inbox := plant.bench.inbox, FaultyInbox)
    assert [SECONDS_A_PRIORITY * pending.priority for pending in inbox.submitted[-3:]] == [0, 10, 20]
