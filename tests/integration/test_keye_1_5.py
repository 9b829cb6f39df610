"""Keye-VL-1.5 from files to an answer: real decoders, utilities and engine, with a model of random weights."""

import time
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from redis import Redis

from keye.config.job import AnalysisJob
from keye.config.outcome import ModelIdentity, WorkerIdentity
from keye.config.settings import Settings
from keye.worker.engine.inbox import SamplingOptions
from keye.worker.engine.step_loop import Engine
from keye.worker.engine.step_plan import StepLimits
from keye.worker.leases.claims import Claimed
from keye.worker.media.job_media import DecoderPool, MediaCache, MediaLimits
from keye.worker.model.image_processing import Video
from keye.worker.model.keye import KeyeForConditionalGeneration
from keye.worker.model.load import load_model
from keye.worker.model.processor import KeyeProcessor, PreparedPrompt
from keye.worker.results.event_writer import EventWriter
from keye.worker.tasks.attempt import Attempt
from keye.worker.tasks.lookahead import Lookahead
from keye.worker.tasks.sampling import load_sampling
from keye.worker.tasks.workbench import Workbench

CHECKPOINT = Path(__file__).parents[1] / "golden" / "v1_5" / "checkpoint"
NEW_TOKENS = 24
torch.set_num_threads(1)  # The model is tiny; threads that wait for each other only slow it down.


class NotingProcessor(KeyeProcessor):
    """The real one; keeps the prompts it made."""

    def prepare_text(self, *args: Any, **kwargs: Any) -> PreparedPrompt:
        self.latest = super().prepare_text(*args, **kwargs)
        return self.latest


@pytest.fixture(scope="module")
def processor() -> KeyeProcessor:
    return NotingProcessor.from_checkpoint(CHECKPOINT)


@pytest.fixture(scope="module")
def plain_model() -> KeyeForConditionalGeneration:
    return load_model(CHECKPOINT, dtype=torch.float32)


@pytest.fixture(scope="module")
def engine(processor: KeyeProcessor) -> Iterator[Engine]:
    engine = Engine(load_model(CHECKPOINT, dtype=torch.float32), processor, kv_cache_bytes=2**26)
    engine.start()
    yield engine
    engine.stop()


@pytest.fixture
def bench(engine: Engine, processor: KeyeProcessor, redis: Redis, decoders: DecoderPool, tmp_path: Path) -> Workbench:
    return Workbench(
        inbox=engine.inbox,
        processor=processor,
        sampling=load_sampling(CHECKPOINT),
        media_limits=MediaLimits.of(Settings(media_roots=(tmp_path,))),
        media_cache=MediaCache(tmp_path / "cache", max_bytes=0),
        decoders=decoders,
        lookahead=Lookahead(decoders.num_decoders),
        events=EventWriter(redis),
        model=ModelIdentity(name="random", model_type="KeyeVL1_5", precision="float32"),
        worker=WorkerIdentity(host="here", pid=1, device="cpu"),
    )


def answer(bench: Workbench, *media: dict[str, Any]) -> Any:
    generation = {"max_new_tokens": NEW_TOKENS, "temperature": 0}
    job = AnalysisJob.model_validate({"media": media, "prompt": "What happens?", "generation": generation})
    return Attempt(bench, job, Claimed("job", "token", 1, 3, time.time(), None, None, None)).run()


def generated_alone(model: KeyeForConditionalGeneration, processor: Any) -> str:
    """What `generate` says to the prompt that the latest job came to."""
    batch = processor.pad_left([processor.latest])
    tokens = model.generate(**batch, do_sample=False, max_new_tokens=NEW_TOKENS)
    return processor.tokenizer.decode(tokens[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def encode_colours(path: Path, colours: Sequence[tuple[int, int, int]], seconds: Sequence[float]) -> str:
    """A clip of 168x112 pixels that turns to each colour at its time."""
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 168, 112, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for colour, time_shown in zip(colours, seconds, strict=True):
            frame = av.VideoFrame.from_ndarray(np.full((112, 168, 3), colour, np.uint8), format="rgb24")
            frame.pts, frame.time_base = round(time_shown * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return str(path)


def test_image_is_answered_as_by_generate(
    bench: Workbench, processor: KeyeProcessor, plain_model: KeyeForConditionalGeneration, tmp_path: Path
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    result = answer(bench, {"type": "image", "uri": str(tmp_path / "picture.png")})
    assert result.usage.completion_tokens == NEW_TOKENS
    assert result.raw_text == generated_alone(plain_model, processor)


@pytest.mark.holds(
    "docs/model.md#frames",
    "The times in the prompt are those at which the file shows the frames",
    "the processor brings each to its exact size",
)
def test_video_is_shown_as_slow_and_fast_frames_with_the_clips_own_times(
    bench: Workbench, processor: Any, plain_model: KeyeForConditionalGeneration, tmp_path: Path
) -> None:
    white, blue = (250, 250, 250), (20, 20, 210)
    times = [0, 0.3, 1.1, 1.6, 2.9]
    clip = encode_colours(tmp_path / "clip.mp4", [white, white, blue, blue, white], times)
    result = answer(bench, {"type": "video", "uri": clip, "fps": 30})

    assert result.raw_text == generated_alone(plain_model, processor)
    shown = processor.latest.text.split("<|vision_start|>")[1].split("<|vision_end|>")[0].split("<|frame|>")[1:]
    pads = [frame.count("<|video_pad|>") for frame in shown]
    assert [frame.replace("<|video_pad|>", "") for frame in shown] == [
        "0.0",
        "0.3<|fast_start|><|fast_end|>",
        "1.1",
        "1.6<|fast_start|><|fast_end|>",
        "2.9",
    ]
    (seen,) = result.media
    assert seen.frames == 5
    assert seen.original_size == (112, 168)
    assert seen.visual_tokens == result.usage.visual_tokens == sum(pads)
    height, width = seen.resized_size
    assert pads[0] == pads[2] == pads[4] == height * width // 28**2 >= 48


def test_image_and_two_videos_share_a_prompt(
    bench: Workbench, processor: KeyeProcessor, plain_model: KeyeForConditionalGeneration, tmp_path: Path
) -> None:
    Image.new("RGB", (120, 90), "teal").save(tmp_path / "picture.png")
    clips = [encode_colours(tmp_path / f"{n}.mp4", [(200, 30, 30 * n), (30, 200, 30)], [0, 0.5 + n]) for n in range(2)]
    result = answer(
        bench,
        {"type": "video", "uri": clips[0]},
        {"type": "image", "uri": str(tmp_path / "picture.png")},
        {"type": "video", "uri": clips[1], "resized_height": 112, "resized_width": 168},
    )
    assert [seen.type for seen in result.media] == ["video", "image", "video"]
    assert result.media[2].resized_size == (112, 168)
    assert result.raw_text == generated_alone(plain_model, processor)


def test_frames_are_encoded_as_the_steps_reach_them(
    processor: KeyeProcessor, plain_model: KeyeForConditionalGeneration
) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (12, 56, 56, 3), np.uint8)
    content = [{"type": "video"}, {"type": "text", "text": "What happens?"}]
    prompt = processor.prepare([{"role": "user", "content": content}], videos=[Video(frames)])
    model = load_model(CHECKPOINT, dtype=torch.float32)
    encoded: list[int] = []
    model.visual.register_forward_hook(lambda _, args, __: encoded.append(len(args[0])))
    engine = Engine(model, processor, kv_cache_bytes=2**24, limits=StepLimits(max_step_tokens=20))
    engine.start()
    pending = engine.inbox.submit(prompt, SamplingOptions(8))
    list(pending.deltas())
    engine.stop()
    assert sum(encoded) == 12 * 16
    assert max(encoded) <= 4 * 16  # 7 tokens a frame, marks included: three, and one that is cut
    whole = plain_model.generate(**processor.pad_left([prompt]), do_sample=False, max_new_tokens=8)
    assert list(pending.generated.token_ids) == whole[0, len(prompt.input_ids) :].tolist()
