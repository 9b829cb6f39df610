"""Images and videos on a device whose memory holds so many patches of them at once, and no more."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from keye.config.codes import ErrorCode
from keye.config.faults import Fault
from keye.worker.engine.inbox import PendingGeneration, SamplingOptions
from keye.worker.engine.step_loop import Engine
from keye.worker.model.image_processing import Image, Video
from keye.worker.model.load import load_model
from keye.worker.model.processor import KeyeProcessor, PreparedPrompt

CHECKPOINT = Path(__file__).parents[1] / "golden" / "preview" / "checkpoint"
MAX_PATCHES = 60
torch.set_num_threads(1)  # The model is tiny; threads that wait for each other only slow it down.


@pytest.fixture(scope="module")
def processor() -> KeyeProcessor:
    return KeyeProcessor.from_checkpoint(CHECKPOINT)


@pytest.fixture
def encoded() -> list[int]:
    """Patches of each call of the tower that had room."""
    return []


@pytest.fixture
def engine(processor: KeyeProcessor, encoded: list[int]) -> Iterator[Engine]:
    model = load_model(CHECKPOINT, dtype=torch.float32)

    def forward(pixels: torch.Tensor, *args: Any, run: Callable[..., torch.Tensor] = model.visual.forward) -> Any:
        if len(pixels) > MAX_PATCHES:
            raise torch.OutOfMemoryError(f"{MAX_PATCHES} patches are the limit")
        encoded.append(len(pixels))
        return run(pixels, *args)

    model.visual.forward = forward
    engine = Engine(model, processor, kv_cache_bytes=2**25)
    engine.start()
    yield engine
    engine.stop()


def show(processor: KeyeProcessor, *media: Image | Video) -> PreparedPrompt:
    images = [medium for medium in media if isinstance(medium, Image)]
    videos = [medium for medium in media if isinstance(medium, Video)]
    content = [{"type": "image"}] * len(images) + [{"type": "video"}] * len(videos)
    content.append({"type": "text", "text": "What do you see?"})
    return processor.prepare([{"role": "user", "content": content}], images=images, videos=videos)


def ask(engine: Engine, prompt: PreparedPrompt) -> PendingGeneration:
    """Read to its end."""
    pending = engine.inbox.submit(prompt, SamplingOptions(8))
    for _ in pending.deltas():
        pass
    return pending


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)


@pytest.mark.holds(
    "docs/operations.md#which-failures-are-tried-again",
    "the reason names the largest size that has gone through that worker",
)
def test_video_without_room_fails_and_says_what_fits(engine: Engine, processor: KeyeProcessor) -> None:
    four_frames = show(processor, Video(noise(4, 56, 84)))  # of 24 patches each
    with pytest.raises(Fault, match=r"4 frames of 84 x 56 pixels\. Lower max_pixels, max_frames or fps\.$") as raised:
        ask(engine, four_frames)
    assert raised.value.code is ErrorCode.OUT_OF_MEMORY
    ask(engine, show(processor, Image(noise(112, 84))))
    with pytest.raises(Fault, match="fps: max_frames 2 or below fits, with max_pixels 4704"):
        ask(engine, four_frames)
    assert ask(engine, show(processor, Video(noise(2, 56, 84), max_pixels=4704))).generated.token_ids


def test_image_without_room_says_how_many_pixels_fit(
    engine: Engine, processor: KeyeProcessor, encoded: list[int]
) -> None:
    ask(engine, show(processor, Image(noise(84, 84))))
    with pytest.raises(Fault, match="an image of 168 x 168 pixels") as raised:
        ask(engine, show(processor, Image(noise(168, 168))))
    told = re.search(r"max_pixels (\d+) or below fits", str(raised.value))
    assert told is not None
    assert int(told[1]) == encoded[-1] * 14**2 == 84 * 84
    assert ask(engine, show(processor, Image(noise(168, 168), max_pixels=int(told[1])))).generated.token_ids


def test_images_without_room_side_by_side_are_encoded_one_by_one(
    engine: Engine, processor: KeyeProcessor, encoded: list[int]
) -> None:
    prompt = show(processor, *(Image(noise(56 + 28 * n, 84)) for n in range(3)))
    answered = ask(engine, prompt).generated.token_ids
    assert encoded == [24, 36, 48]
    plain = load_model(CHECKPOINT, dtype=torch.float32)
    whole = plain.generate(**processor.pad_left([prompt]), do_sample=False, max_new_tokens=8)
    assert list(answered) == whole[0, len(prompt.input_ids) :].tolist()


@pytest.mark.holds("docs/operations.md#which-failures-are-tried-again", "if that is smaller")
def test_what_has_no_room_beside_others_only_is_told_no_number(engine: Engine, processor: KeyeProcessor) -> None:
    """Others' memory ran out, when as large an image has had room before."""
    ask(engine, show(processor, Image(noise(112, 84))))
    image = show(processor, Image(255 - noise(112, 84)))

    def fail(*_: Any) -> Any:
        raise torch.OutOfMemoryError("of another process")

    engine._runner._model.visual.forward = fail
    with pytest.raises(Fault, match=r"an image of 84 x 112 pixels\. Lower max_pixels, max_frames or fps\.$"):
        ask(engine, image)
