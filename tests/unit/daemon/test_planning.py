"""The plan that people see before they send a job is what the job then gets."""

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from keye.worker.daemon.cli import app
from keye.worker.daemon.planning import CheckpointFacts, part_of, plan_media
from keye.worker.media.decode.image import decode_image
from keye.worker.media.fetch.fetched import Identity
from keye.worker.media.frames.video import decode_video
from keye.worker.model.processor import KeyeProcessor
from keye.worker.tasks.visual_inputs import visual_inputs
from tests.support.zoo import draw_quarters, encode_clip, steady_times

GOLDEN = Path(__file__).parents[2] / "golden"
PREVIEW, V1_5 = GOLDEN / "preview" / "checkpoint", GOLDEN / "v1_5" / "checkpoint"


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return encode_clip(tmp_path / "clip.mp4", steady_times(90))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.jpg"
    Image.fromarray(draw_quarters(600, 800)).save(path)
    return path


@pytest.mark.holds("docs/producers.md#how-much-of-a-video-is-read", "On a worker's machine `keye plan FILE...")
@pytest.mark.parametrize("room", [10_000, 200])
@pytest.mark.parametrize("checkpoint", [PREVIEW, V1_5], ids=["preview", "v1_5"])
def test_planned_tokens_are_those_of_the_prompt(checkpoint: Path, clip: Path, photo: Path, room: int) -> None:
    parts = [part_of(photo), part_of(clip, fps=5)]
    planned = plan_media(parts, CheckpointFacts.read(checkpoint), room, 0.5)
    processor = KeyeProcessor.from_checkpoint(checkpoint)
    sizing = processor.sizing.share(parts, room)
    with photo.open("rb") as image_file, clip.open("rb") as video_file:
        decoded = [
            decode_image(image_file, 10**7),
            decode_video(video_file, parts[1], sizing.fit_video, 10**7),
        ]
    images, videos, seen = visual_inputs(sizing, parts, [Identity(1), Identity(2)], decoded)
    content = [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "What?"}]
    prompt = processor.prepare([{"role": "user", "content": content}], images, videos)
    assert [medium.frames for medium in planned] == [1, len(decoded[1].frames)]
    assert [medium.frames for medium in seen] == [medium.frames for medium in planned]
    assert [medium.resized_size for medium in seen[:1]] == [medium.size for medium in planned[:1]]
    assert sum(medium.visual_tokens for medium in seen) == prompt.num_visual_tokens
    num_tokens = sum(medium.visual_tokens for medium in planned)
    assert num_tokens <= room
    if checkpoint is PREVIEW:
        assert num_tokens == prompt.num_visual_tokens
    else:
        assert prompt.num_visual_tokens <= num_tokens


def test_clip_that_is_too_long_for_the_room_is_planned_shorter_and_says_why(clip: Path) -> None:
    (planned,) = plan_media([part_of(clip, fps=30)], CheckpointFacts.read(PREVIEW), 100, min_frames_per_second=30)
    assert (planned.frames_asked, planned.frames) == (90, 100 * 784 // (planned.size[0] * planned.size[1]))
    assert planned.visual_tokens <= 100
    assert planned.reasons[-1] == f"the context has room for {planned.frames} of 90 frames"
    assert f"{planned.frames / 90:.0%} of the video is covered" in str(planned.warning)


def test_keye_worker_plan_prints_a_table_or_json(clip: Path, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYE_MODEL_PATH", str(PREVIEW))
    table = CliRunner().invoke(app, ["plan", str(clip), str(photo)], env={"COLUMNS": "200"})
    assert table.exit_code == 0, table.output
    assert "clip.mp4" in table.output
    assert "6 (2/s)" in table.output
    told = json.loads(CliRunner().invoke(app, ["plan", str(clip), "--content", "static", "--json"]).output)
    assert told["media"][0]["frames"] == 15
    assert told["visual_tokens"] == told["media"][0]["visual_tokens"] < told["room"]


def test_file_that_cannot_be_read_ends_the_plan_with_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEYE_MODEL_PATH", str(PREVIEW))
    (tmp_path / "list.mp4").write_text("#EXTM3U\n/etc/passwd\n")
    told = CliRunner().invoke(app, ["plan", str(tmp_path / "list.mp4")])
    assert told.exit_code != 0
    assert "playlist" in told.stderr
