"""A job that was answered runs again from its record, and is told to have come to the same, or to what else."""

import hashlib
import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from keye.config import keys
from keye.config.job import AnalysisJob, ImagePart, Priority
from keye.producer import Job, JobNotFound
from keye.producer.cli import app
from keye.producer.shell import ExitCode
from tests.integration.analyze.plant import CONCURRENCY, Plant, a_job, briefly, endlessly

NUM_JOBS, NUM_REPLAYS = 20, 5


@pytest.fixture
def keye(valkey_url: str, monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    monkeypatch.setenv("KEYE_REDIS_URL", valkey_url)
    return CliRunner()


def drawn(picture: str, **options: object) -> AnalysisJob:
    """A job whose text is drawn by chance, of which a model of random weights makes another each time."""
    fields = {"media": [{"type": "image", "uri": picture, "digest": True}], "prompt": "what?"}
    generation = briefly() | {"max_new_tokens": 24, "temperature": 1.5}
    return AnalysisJob.model_validate(fields | {"generation": generation, **options})


@pytest.mark.holds("docs/operations.md#was-that-really-what-the-model-saw", "A job that runs again with the same seed")
def test_jobs_that_run_again_beside_others_come_to_the_same_text(plant: Plant, picture: str) -> None:
    firsts = [plant.client.submit(drawn(picture)) for _ in range(NUM_JOBS)]
    texts = {job.id: plant.finish(job).raw_text for job in firsts}
    assert len(set(texts.values())) == NUM_JOBS
    company = [plant.client.submit(a_job(generation=endlessly())) for _ in range(CONCURRENCY // 2)]
    again = [(job, plant.client.replay(job.id)) for job in firsts for _ in range(NUM_REPLAYS)]
    same = sum(plant.finish(replay).raw_text == texts[first.id] for first, replay in again)
    for job in company:
        job.cancel()
    assert same == NUM_JOBS * NUM_REPLAYS


@pytest.mark.holds(
    "docs/operations.md#was-that-really-what-the-model-saw",
    "runs an answered job again from its record, as a new job with the seed of its result",
)
@pytest.mark.holds("docs/operations.md#was-that-really-what-the-model-saw", "but has no idempotency key")
def test_the_command_says_that_it_is_the_same(plant: Plant, picture: str, keye: CliRunner) -> None:
    asked = drawn(picture, priority=Priority.LOW, deadline_seconds=300, idempotency_key="once", metadata={"order": 7})
    job = plant.client.submit(asked)
    result = plant.finish(job)
    ran = keye.invoke(app, ["replay", job.id, "--timeout", "60"])
    assert (ran.exit_code, ran.stdout) == (ExitCode.OK, "the same: media, model, generation and text\n")
    replayed = Job(ran.stderr.strip().partition(f"{job.id} -> ")[2], plant.client.job(job.id)._transport)
    sealed = json.loads(plant.record(replayed.id)["sealed"])["job"]
    assert sealed["generation"]["seed"] == result.generation.seed
    assert (sealed["priority"], sealed["deadline_seconds"], sealed["idempotency_key"]) == ("low", 300, None)
    assert replayed.result(0).metadata == {"order": 7}
    # The key still leads to the first.
    assert plant.client.submit(asked).id == job.id


@pytest.mark.holds("docs/operations.md#was-that-really-what-the-model-saw", "It ends with 11 where anything does.")
def test_the_command_says_what_differs_and_nothing_of_it_moves_the_cursor(plant: Plant, keye: CliRunner) -> None:
    picture = plant.media / "changes.png"
    Image.new("RGB", (120, 90), "teal").save(picture)
    before = hashlib.sha256(picture.read_bytes()).hexdigest()
    job = plant.client.submit(drawn(str(picture)))
    result = plant.finish(job)
    Image.new("RGB", (90, 120), "red").save(picture)
    after = hashlib.sha256(picture.read_bytes()).hexdigest()
    other = result.model_copy(
        update={"raw_text": "\x1b[2Jother", "model": result.model.model_copy(update={"name": "b"})}
    )
    plant.redis.hset(keys.record(job.id), "outcome", other.model_dump_json())
    ran = keye.invoke(app, ["replay", job.id, "--timeout", "60"])
    assert ran.exit_code == ExitCode.DIFFERENT
    assert f"media[0].sha256: '{before}' -> '{after}'\n" in ran.stdout
    assert "media[0].original_size: '(90, 120)' -> '(120, 90)'\n" in ran.stdout
    assert "model.name: 'b' -> 'random'\n" in ran.stdout
    assert "raw_text: " in ran.stdout
    assert "\x1b" not in ran.stdout
    told = json.loads(keye.invoke(app, ["replay", job.id, "--json"]).stdout)
    assert (told["job_id"], told["is_same"]) == (job.id, False)
    assert {"media[0].sha256", "model.name", "raw_text"} <= {each["what"] for each in told["differences"]}


def test_a_file_that_was_copied_is_the_same_where_its_digest_is(plant: Plant, keye: CliRunner) -> None:
    picture = plant.media / "copied.png"
    Image.new("RGB", (120, 90), "teal").save(picture)
    with_digest = plant.client.submit(drawn(str(picture)))
    without = plant.client.submit(drawn(str(picture), media=[ImagePart(uri=str(picture))]))
    plant.finish(with_digest)
    plant.finish(without)
    content = picture.read_bytes()
    picture.rename(plant.media / "kept.png")
    picture.write_bytes(content)
    assert keye.invoke(app, ["replay", with_digest.id]).exit_code == ExitCode.OK
    ran = keye.invoke(app, ["replay", without.id])
    assert (ran.exit_code, "media[0].inode: " in ran.stdout) == (ExitCode.DIFFERENT, True)


@pytest.mark.holds(
    "docs/operations.md#was-that-really-what-the-model-saw", "A job can be replayed as long as its record is kept"
)
def test_the_command_says_why_there_is_nothing_to_compare(plant: Plant, keye: CliRunner) -> None:
    absent = keye.invoke(app, ["replay", "absent"])
    assert (absent.exit_code, absent.stderr) == (ExitCode.NOT_FOUND, f"{JobNotFound.of('absent')}\n")
    picture = plant.media / "gone.png"
    failed = plant.client.submit(drawn(str(picture)))
    plant.fail(failed)
    ran = keye.invoke(app, ["replay", failed.id])
    assert ran.exit_code == ExitCode.JOB_FAILED
    assert ran.stderr.startswith(f"{failed.id}, which was to be replayed, ended without an answer. MEDIA_NOT_FOUND: ")
    Image.new("RGB", (120, 90), "teal").save(picture)
    job = plant.client.submit(drawn(str(picture)))
    plant.finish(job)
    picture.unlink()
    ran = keye.invoke(app, ["replay", job.id])
    assert ran.exit_code == ExitCode.JOB_FAILED
    assert "its replay, ended without an answer. MEDIA_NOT_FOUND: " in ran.stderr
    running = plant.client.submit(a_job(generation=endlessly()))
    assert keye.invoke(app, ["replay", running.id]).exit_code == ExitCode.NOT_ENDED
    running.cancel()


def test_what_cannot_be_read_of_a_record_is_told(plant: Plant, keye: CliRunner, picture: str) -> None:
    job = plant.client.submit(drawn(picture))
    plant.finish(job)
    plant.redis.hset(keys.record(job.id), "sealed", "{}")
    ran = keye.invoke(app, ["replay", job.id])
    assert (ran.exit_code, ran.stderr.partition(" of job")[0]) == (ExitCode.INVALID, "The input")
