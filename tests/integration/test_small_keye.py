"""The committed small Keye answers rightly through the real processor and `generate`; other tests rely on that."""

import io
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image as PillowImage

from keye.worker.demo.local_worker import SMALL_KEYE
from keye.worker.demo.scenes import draw_image_scene, draw_video_scene
from keye.worker.model.image_processing import Image, Video
from keye.worker.model.keye import KeyeForConditionalGeneration
from keye.worker.model.load import load_model
from keye.worker.model.processor import KeyeProcessor
from tools.small_keye.evaluate import REQUIRED_SHARE, Exam, ask, evaluate, share_right


@pytest.fixture(scope="module")
def model() -> KeyeForConditionalGeneration:
    return load_model(SMALL_KEYE, dtype=torch.float32)


@pytest.fixture(scope="module")
def processor() -> KeyeProcessor:
    return KeyeProcessor.from_checkpoint(SMALL_KEYE)


def encoded_clip(frames: np.ndarray, codec: str, fps: int) -> list[np.ndarray]:
    """The frames as a lossy codec gives them back."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream(codec, rate=Fraction(fps))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    file.seek(0)
    with av.open(file) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_it_is_small_enough_to_ship() -> None:
    assert sum(file.stat().st_size for file in SMALL_KEYE.iterdir()) <= 8_000_000


def test_scenes_it_never_saw_are_answered_right_in_every_thinking_mode() -> None:
    results = evaluate(SMALL_KEYE, num_scenes=60, first_seed=2_000_000)
    assert {exam.thinking for exam, _ in results} == {"auto", "think", "no_think"}
    wrong = [(exam.question.text, said, exam.expected) for exam, said in results if said != exam.expected]
    assert share_right(results) >= REQUIRED_SHARE, wrong


@pytest.mark.parametrize(("kind", "quality"), [("PNG", None), ("JPEG", 60), ("WEBP", 50)])
def test_image_files_of_any_size_are_answered_right(
    model: KeyeForConditionalGeneration, processor: KeyeProcessor, kind: str, quality: int | None
) -> None:
    exams = []
    for seed, size in enumerate([(112, 112), (224, 224), (320, 240), (500, 500)]):
        scene = draw_image_scene(np.random.default_rng(3_000_000 + seed), size)
        file = io.BytesIO()
        scene.image.save(file, kind, **({} if quality is None else {"quality": quality}))
        image = Image(PillowImage.open(file))
        exams += [Exam(question, "no_think", [image], []) for question in scene.questions]
    said = ask(model, processor, exams)
    assert np.mean([text == exam.expected for text, exam in zip(said, exams, strict=True)]) >= REQUIRED_SHARE


@pytest.mark.parametrize("codec", ["libx264", "libvpx-vp9"])
def test_clips_sampled_at_two_frames_a_second_are_answered_right(
    model: KeyeForConditionalGeneration, processor: KeyeProcessor, codec: str
) -> None:
    exams = []
    for seed, size in enumerate([(84, 84), (112, 112), (168, 168), (224, 168)] * 2):
        scene = draw_video_scene(np.random.default_rng(3_000_000 + seed), size)
        frames = encoded_clip(scene.frames(fps=10), codec, fps=10)
        video = Video(np.stack(frames[::5]), fps=2.0)
        exams += [Exam(question, "no_think", [], [video]) for question in scene.questions]
    said = ask(model, processor, exams)
    assert np.mean([text == exam.expected for text, exam in zip(said, exams, strict=True)]) >= REQUIRED_SHARE


def test_later_questions_of_a_conversation_are_answered_too(
    model: KeyeForConditionalGeneration, processor: KeyeProcessor
) -> None:
    right = []
    for seed in range(12):
        scene = draw_image_scene(np.random.default_rng(4_000_000 + seed))
        messages: list[dict[str, object]] = []
        for question in scene.questions[:3]:
            media = [] if messages else [{"type": "image"}]
            messages.append({"role": "user", "content": [*media, {"type": "text", "text": question.text}]})
            batch = processor.pad_left([processor.prepare(messages, [Image(scene.image)], thinking="no_think")])
            tokens = model.generate(**batch, max_new_tokens=64)[0, batch["input_ids"].shape[1] :]
            said = processor.tokenizer.decode(tokens, skip_special_tokens=True)
            right.append(said == question.answer)
            messages.append({"role": "assistant", "content": said})
    assert np.mean(right) >= 0.9
