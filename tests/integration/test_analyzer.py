"""`keye.Analyzer`: what it answers and refuses, with the small Keye, real decoders and real files."""

import asyncio
import io
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from keye import (
    Analyzer,
    AsyncClient,
    Cancellation,
    EndedJob,
    ErrorCode,
    ImagePart,
    InvalidJob,
    InvalidSettings,
    JobFailed,
    JobFailure,
    JobResult,
    JobState,
    TextGenerated,
    VideoPart,
)
from keye.worker.demo.local_worker import SMALL_KEYE
from keye.worker.demo.scenes import draw_image_scene
from keye.worker.in_process import transport
from keye.worker.model.load import CheckpointFault
from tests.support.conditions import eventually
from tests.support.zoo import encode_clip

QUESTION = "What do you see?"


@pytest.fixture(scope="module")
def analyzer() -> Iterator[Analyzer]:
    with Analyzer(SMALL_KEYE, device="cpu") as analyzer:
        yield analyzer


@pytest.fixture
def picture() -> Image.Image:
    return draw_image_scene(np.random.default_rng(3), num_shapes=1).image


@pytest.fixture
def photo(picture: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of the working directory, without a suffix that would tell what it is."""
    monkeypatch.chdir(tmp_path)
    picture.save(tmp_path / "photo", "PNG")
    return tmp_path / "photo"


def test_whatever_holds_the_picture_the_answer_is_the_same(
    analyzer: Analyzer, picture: Image.Image, photo: Path
) -> None:
    expected = analyzer.analyze(picture, QUESTION).answer
    assert expected == "A red circle."
    link = photo.with_name("link")
    link.symlink_to(photo)
    odd = photo.with_name(os.fsdecode(b"\xff odd \n%20"))
    odd.write_bytes(photo.read_bytes())
    with photo.open("rb") as opened:
        given: list[Any] = [
            *("photo", str(photo), photo, f"file://{photo}", link, str(link), odd),
            *(photo.read_bytes(), bytearray(photo.read_bytes()), io.BytesIO(photo.read_bytes()), opened),
            *(np.asarray(picture), picture.convert("RGBA")),
            *(ImagePart(uri=str(photo)), {"type": "image", "uri": photo}, {"type": "image", "image": picture}),
            {"type": "image_url", "image_url": {"url": f"file://{photo}"}},
        ]
        assert [analyzer.analyze(each, QUESTION).answer for each in given] == [expected] * len(given)


def test_content_beyond_what_travels_in_a_job_is_read_and_its_copy_removed(analyzer: Analyzer) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1200, 1200, 3), np.uint8)
    result = analyzer.analyze([noise, noise], QUESTION, max_pixels=56 * 56, max_new_tokens=2)
    assert [medium.original_size for medium in result.media] == [(1200, 1200)] * 2
    assert not list(analyzer._folder.iterdir())


def test_the_names_that_scripts_use_are_understood(analyzer: Analyzer, photo: Path) -> None:
    result = analyzer.analyze(
        "photo", QUESTION, thinking_mode="think", do_sample=False, temperature=0.7, max_new_tokens=64, max_pixels=112**2
    )
    assert result.raw_text.startswith("<think>")
    assert result.answer == "A red circle."
    assert result.generation is not None
    assert (result.generation.temperature, result.generation.max_new_tokens) == (0, 64)
    assert result.generation.thinking == "think"
    assert result.media[0].resized_size == (112, 112)
    drawn = analyzer.analyze("photo", QUESTION, do_sample=True, seed=3)
    assert drawn.generation is not None
    assert (drawn.generation.temperature, drawn.generation.seed) == (1.0, 3)
    assert analyzer.analyze("photo", QUESTION, do_sample=True, temperature=0.5).generation.temperature == 0.5  # type: ignore[union-attr]


def test_a_video_is_read_at_the_rate_and_the_size_that_are_asked(analyzer: Analyzer, tmp_path: Path) -> None:
    clip = encode_clip(tmp_path / "clip.mp4", [number / 20 for number in range(40)])
    for given in (clip, str(clip), clip.read_bytes(), VideoPart(uri=str(clip)), {"type": "video", "video": clip}):
        result = analyzer.video(given, QUESTION, fps=5, max_pixels=84 * 84)
        assert result.media[0].type == "video"
        assert result.media[0].frames == 10
        assert np.prod(result.media[0].resized_size) <= 84 * 84
    assert analyzer.video(clip, QUESTION).media[0].frames == 4
    with pytest.raises(InvalidJob, match="is no video"):
        analyzer.video(b"\x89PNG\r\n\x1a\n", QUESTION)


@pytest.mark.holds(
    "docs/from-a-script.md#many-pictures",
    "answers come in the order of the pictures",
    "A bad one costs its neighbours nothing",
)
def test_a_batch_keeps_its_order_and_a_bad_item_is_an_item(analyzer: Analyzer, photo: Path) -> None:
    (photo.parent / "broken.png").write_bytes(photo.read_bytes()[:60])
    colours = ["red", "blue"] * 20
    pictures: list[Any] = [Image.new("RGB", (112, 112), colour) for colour in colours]
    alone = {colour: analyzer.analyze(Image.new("RGB", (112, 112), colour), QUESTION).answer for colour in colours}
    pictures[3:3] = ["nowhere.png", "/nowhere.png", "broken.png", None, b"text"]
    ends = analyzer.batch(pictures, QUESTION)
    bad, good = ends[3:8], ends[:3] + ends[8:]
    assert [type(end) for end in bad] == [InvalidJob, JobFailure, JobFailure, InvalidJob, InvalidJob]
    assert [end.code for end in bad if isinstance(end, JobFailure)] == [
        ErrorCode.MEDIA_NOT_FOUND,
        ErrorCode.MEDIA_CORRUPT,
    ]
    assert [end.answer for end in good if isinstance(end, JobResult)] == [alone[colour] for colour in colours]


@pytest.mark.holds("docs/from-a-script.md#many-pictures", "One prompt for all")
def test_a_batch_asks_one_question_or_one_each(analyzer: Analyzer, photo: Path) -> None:
    questions = (question for question in (QUESTION, "图里有什么"))
    ends = analyzer.batch(iter(["photo", ["photo", "photo"]]), questions, thinking_mode="no_think", max_new_tokens=8)
    assert [len(end.media) for end in ends if isinstance(end, JobResult)] == [1, 2]
    assert analyzer.batch([], QUESTION) == []
    with pytest.raises(ValueError, match="2 images and 1 prompts"):
        analyzer.batch(["photo", "photo"], [QUESTION])
    with pytest.raises(TypeError, match="give a list of them"):
        analyzer.batch("photo", QUESTION)
    for options in ({"temprature": 1}, {"temperature": 3}, {"max_pixels": 1}, {"fps": -1}, {"thinking_mode": "hard"}):
        with pytest.raises(InvalidJob):
            analyzer.batch(["photo"], QUESTION, **options)


def test_text_is_read_as_it_is_written(analyzer: Analyzer, photo: Path) -> None:
    events = list(analyzer.stream("photo", QUESTION, thinking_mode="think"))
    written = {channel: "".join(e.text for e in events if e.channel == channel) for channel in ("reasoning", "answer")}
    result = analyzer.analyze("photo", QUESTION, thinking_mode="think")
    assert written == {"reasoning": result.reasoning, "answer": result.answer}
    with pytest.raises(JobFailed, match="MEDIA_NOT_FOUND"):
        list(analyzer.stream("/nowhere.png", QUESTION))


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Analyzer]:
    """Of a model that never ends by itself."""
    folder = tmp_path_factory.mktemp("endless") / "checkpoint"
    shutil.copytree(SMALL_KEYE, folder)
    config = folder / "generation_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": 0}))
    with Analyzer(folder, device="cpu") as analyzer:
        yield analyzer


LONG = {"max_new_tokens": 4000}


def ended_after(analyzer: Analyzer, act: Callable[[], object]) -> EndedJob:
    """The first job that ends once this is done."""
    before = [each.id for each in analyzer.watch("0", timeout=0)]
    act()
    return next(analyzer.watch(before[-1] if before else "0", timeout=30))


def test_who_stops_reading_stops_the_job(endless: Analyzer, photo: Path) -> None:
    def stop_reading() -> None:
        stream = endless.stream("photo", QUESTION, **LONG)
        next(stream)
        stream.close()

    assert ended_after(endless, stop_reading).state is JobState.CANCELLED


@pytest.mark.holds("docs/design.md#decisions", "leases, further attempts, dead letters")
@pytest.mark.holds("docs/from-a-script.md#from-a-script-to-a-fleet", "An `Analyzer` is a `Client`", "tries a job once")
def test_a_job_has_a_clients_verbs(endless: Analyzer, photo: Path) -> None:
    asked = {"prompt": QUESTION, "media": ["photo"], "generation": LONG, "idempotency_key": photo.parent.name}
    job = endless.submit(**asked)
    assert endless.submit(**asked).id == job.id
    assert next(event for event in job.events() if isinstance(event, TextGenerated)).text
    assert endless.find(job.id).progress.num_tokens > 0
    assert job.cancel() is Cancellation.REQUESTED
    with pytest.raises(JobFailed) as failed:
        job.result(timeout=30)
    assert failed.value.code is ErrorCode.CANCELLED
    assert failed.value.failure.partial is not None
    with pytest.raises(JobFailed, match="DEADLINE_EXCEEDED"):
        endless.analyze("photo", QUESTION, deadline_seconds=0.5, **LONG)
    with pytest.raises(NotImplementedError, match="no workers"):
        endless.status()


def test_urgent_jobs_go_first_and_cancelled_ones_never(endless: Analyzer, photo: Path) -> None:
    """Of those that wait until others have left the engine."""
    running = [endless.submit(prompt=QUESTION, generation=LONG) for _ in range(64)]
    waiting = [endless.submit(prompt=QUESTION, generation={"max_new_tokens": 2}) for _ in range(39)]
    waiting.append(endless.submit(prompt=QUESTION, media=[Image.new("RGB", (9, 9))]))
    urgent = endless.submit(prompt=QUESTION, generation={"max_new_tokens": 2}, priority="high")
    assert waiting[-1].state is urgent.state is JobState.QUEUED
    assert waiting[-1].cancel() is Cancellation.CANCELLED
    for job in running:
        job.cancel()
    ended = [job.id for job, _ in endless.results([waiting[-2], urgent], timeout=60)]
    assert ended == [urgent.id, waiting[-2].id]
    assert waiting[-1].state is JobState.CANCELLED
    eventually(lambda: not list(endless._folder.iterdir()))


@pytest.mark.holds("docs/from-a-script.md#from-a-script-to-a-fleet", "`AsyncClient(analyzer)` is the same")
@pytest.mark.holds("docs/batches.md#from-python", "an `Analyzer` runs a batch without Redis")
def test_a_batch_in_a_file_goes_on_where_a_process_died(photo: Path, tmp_path: Path, endless: Analyzer) -> None:
    (photos := tmp_path / "photos").mkdir()
    for number in range(3):
        shutil.copy(photo, photos / f"{number}.png")
    asked = photos, tmp_path / "answers.jsonl", QUESTION
    # Of what this process takes with it nobody can say how it would have ended.
    batch = endless.submit_batch(*asked)
    eventually(lambda: batch.progress.in_flight == 3)
    batch.stop()
    with Analyzer(SMALL_KEYE, device="cpu") as another:
        assert another.submit_batch(*asked).wait(120)[:3] == (3, 3, 0)
    answers = map(json.loads, asked[1].read_text().splitlines())
    assert sorted(line["custom_id"] for line in answers) == ["0.png", "1.png", "2.png"]


def test_a_task_of_asyncio_asks_by_the_same_verbs(photo: Path) -> None:
    async def ask() -> list[str]:
        async with AsyncClient(Analyzer(SMALL_KEYE, device="cpu")) as client:
            jobs = [await client.submit(prompt=QUESTION, media=["photo"]) for _ in range(3)]
            return [(await job.result()).answer for job in jobs]

    assert asyncio.run(ask()) == ["A red circle."] * 3


def test_of_ended_jobs_the_newest_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "MAX_ENDED", 2)
    with Analyzer(SMALL_KEYE, device="cpu") as analyzer:
        jobs = [analyzer.submit(prompt=QUESTION, generation={"max_new_tokens": 1}) for _ in range(4)]
        list(analyzer.results(jobs[-1:], timeout=30))
        eventually(lambda: sum(job_id in analyzer._transport.records for job_id in [j.id for j in jobs]) == 2)  # type: ignore[attr-defined]
        assert len(list(analyzer.watch(timeout=0, after="0"))) == 2


def test_nothing_is_left_once_it_is_closed_or_dropped(photo: Path) -> None:
    before = set(threading.enumerate())
    analyzer = Analyzer(SMALL_KEYE, device="cpu")
    folder, job = analyzer._folder, analyzer.submit(prompt=QUESTION)
    analyzer.close()
    analyzer.close()
    assert not folder.exists()
    assert job.state.is_final
    with pytest.raises(RuntimeError, match="The analyzer is closed"):
        analyzer.analyze("photo", QUESTION)
    dropped = Analyzer(SMALL_KEYE, device="cpu")
    dropped.analyze("photo", QUESTION)
    del dropped
    eventually(lambda: set(threading.enumerate()) <= before)


def test_settings_come_before_the_environment_and_misspelt_ones_are_told(
    photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEYE_MODEL_PATH", "/nowhere")
    monkeypatch.setenv("KEYE_MEDIA_ROOTS", "/nowhere")
    monkeypatch.setenv("KEYE_MAX_IMAGE_PIXELS", "100")
    with pytest.raises(CheckpointFault, match="/nowhere is not a directory here"):
        Analyzer()
    with Analyzer(SMALL_KEYE, device="cpu", media_roots=[photo.parent]) as analyzer:
        with pytest.raises(JobFailed, match="MEDIA_TOO_LARGE"):
            analyzer.analyze("photo", QUESTION)
        with pytest.raises(JobFailed, match="MEDIA_FORBIDDEN"):
            analyzer.analyze("/usr/share/nothing.png", QUESTION)
        # What is no file of his is none that roots could forbid.
        assert analyzer.analyze(Image.new("RGB", (9, 9)), QUESTION).answer
    monkeypatch.delenv("KEYE_MODEL_PATH")
    with pytest.raises(InvalidSettings, match="KEYE_MODEL_PATH"):
        Analyzer()
    with pytest.raises(InvalidSettings, match=r"precission: is no setting, did you mean precision\?"):
        Analyzer(SMALL_KEYE, precission="int8")
    with pytest.raises(CheckpointFault, match="hf download Someone/Keye --local-dir Keye"):
        Analyzer("Someone/Keye")
