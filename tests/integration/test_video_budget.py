"""A video too long for the engine is shown smaller and thinner instead of failing, and the result says all of it."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from redis import Redis

from keye.config.job import AnalysisJob
from keye.config.outcome import JobResult, ModelIdentity, WorkerIdentity
from keye.config.settings import Settings
from keye.worker.engine.step_loop import Engine
from keye.worker.leases.claims import Claimed
from keye.worker.media.job_media import DecoderPool, MediaCache, MediaLimits
from keye.worker.model.load import load_model
from keye.worker.model.processor import KeyeProcessor
from keye.worker.results.event_writer import EventWriter
from keye.worker.tasks.attempt import Attempt
from keye.worker.tasks.lookahead import Lookahead
from keye.worker.tasks.sampling import load_sampling
from keye.worker.tasks.workbench import Workbench
from tests.support.zoo import encode_clip

GOLDEN = Path(__file__).parents[1] / "golden"
CLIP_SECONDS = 400
torch.set_num_threads(1)  # The model is tiny; threads that wait for each other only slow it down.


@pytest.fixture(scope="module", params=["preview", "v1_5"])
def checkpoint(request: pytest.FixtureRequest) -> Path:
    return GOLDEN / request.param / "checkpoint"


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[Engine]:
    """One that holds some hundred tokens at most."""
    engine = Engine(
        load_model(checkpoint, dtype=torch.float32), KeyeProcessor.from_checkpoint(checkpoint), kv_cache_bytes=2**19
    )
    engine.start()
    yield engine
    engine.stop()


@pytest.fixture
def bench(checkpoint: Path, engine: Engine, redis: Redis, decoders: DecoderPool, tmp_path: Path) -> Workbench:
    return Workbench(
        inbox=engine.inbox,
        processor=KeyeProcessor.from_checkpoint(checkpoint),
        sampling=load_sampling(checkpoint),
        media_limits=MediaLimits.of(Settings(media_roots=(tmp_path,), min_frames_per_second=0.9)),
        media_cache=MediaCache(tmp_path / "cache", max_bytes=0),
        decoders=decoders,
        lookahead=Lookahead(decoders.num_decoders),
        events=EventWriter(redis),
        model=ModelIdentity(name="random", model_type="Keye", precision="float32"),
        worker=WorkerIdentity(host="here", pid=1, device="cpu"),
    )


@pytest.fixture
def clip(tmp_path: Path) -> str:
    """A frame a second."""
    return str(encode_clip(tmp_path / "long.mp4", [float(second) for second in range(CLIP_SECONDS)]))


def answer(bench: Workbench, *media: dict[str, Any]) -> JobResult:
    generation = {"max_new_tokens": 4, "temperature": 0}
    job = AnalysisJob.model_validate({"media": media, "prompt": "What happens?", "generation": generation})
    return Attempt(bench, job, Claimed("job", "token", 1, 3, time.time(), None, None, None)).run()


def test_long_video_fits_the_engine_and_the_result_warns_of_the_coverage(bench: Workbench, clip: str) -> None:
    result = answer(bench, {"type": "video", "uri": clip})
    (seen,) = result.media
    assert result.usage.prompt_tokens + 4 <= bench.inbox.max_tokens
    assert seen.visual_tokens > 0.5 * bench.inbox.max_tokens
    assert (seen.frames_asked, seen.fps_asked) == (2 * CLIP_SECONDS, 2.0)
    assert 1 < seen.frames < CLIP_SECONDS
    assert "the clip has 400 frames where 768 were asked for" in seen.reasons
    assert f"the context has room for {seen.frames} of 400 frames" in seen.reasons
    (warning,) = result.warnings
    assert f"{seen.frames / CLIP_SECONDS / 0.9:.0%} of the video is covered" in warning
    assert "start_seconds" in warning


def test_two_long_videos_and_their_question_fit_together(bench: Workbench, clip: str) -> None:
    result = answer(bench, {"type": "video", "uri": clip}, {"type": "video", "uri": clip, "content": "static"})
    assert result.usage.prompt_tokens + 4 <= bench.inbox.max_tokens
    assert len(result.warnings) == 2


def test_stretch_that_fits_is_read_as_asked_and_needs_no_warning(bench: Workbench, clip: str) -> None:
    result = answer(bench, {"type": "video", "uri": clip, "start_seconds": 100, "end_seconds": 104, "fps": 1})
    (seen,) = result.media
    assert (seen.frames, seen.fps, seen.frames_asked, seen.reasons, result.warnings) == (4, 1.0, 4, (), ())
    assert seen.decoder == "pyav"
