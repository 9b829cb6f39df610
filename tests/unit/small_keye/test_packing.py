"""What the trainer teaches must be what the worker asks: the same tokens, positions, pixels and visibility."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from keye.worker.demo.questions import Question, Thinking
from keye.worker.demo.scenes import draw_image_scene, draw_images, draw_video_scene
from keye.worker.model.configuration_keye import KeyeConfig
from keye.worker.model.image_processing import Image, Video
from keye.worker.model.keye import KeyeForConditionalGeneration
from keye.worker.model.padded_attention import attend_padded
from keye.worker.model.processor import KeyeProcessor
from tools.small_keye.checkpoint_folder import write_folder
from tools.small_keye.lessons import IGNORED, Item, Lesson
from tools.small_keye.packing import Batch, Packer
from tools.small_keye.tokenizer import train_tokenizer

MODES: tuple[Thinking, ...] = ("auto", "think", "no_think")
Media = tuple[list[Image], list[Video], Sequence[Question]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("untrained")
    write_folder(folder, train_tokenizer())
    return folder


@pytest.fixture(scope="module")
def processor(folder: Path) -> KeyeProcessor:
    return KeyeProcessor.from_checkpoint(folder)


@pytest.fixture(scope="module")
def packer(folder: Path) -> Packer:
    return Packer(Tokenizer.from_file(str(folder / "tokenizer.json")))


@pytest.fixture(scope="module")
def untrained(folder: Path, processor: KeyeProcessor) -> KeyeForConditionalGeneration:
    torch.manual_seed(0)
    model = KeyeForConditionalGeneration(KeyeConfig.from_pretrained(folder)).float().eval()
    model.visual.vision_model.embeddings.normalise = processor.image_processor.normalise
    return model


def one_image() -> Media:
    scene = draw_image_scene(np.random.default_rng(1))
    return [Image(scene.image)], [], scene.questions


def two_images() -> Media:
    scenes, questions = draw_images(np.random.default_rng(2), [(112, 112), (84, 112)])
    return [Image(scene.image) for scene in scenes], [], questions


def a_video_of_another_rate() -> Media:
    scene = draw_video_scene(np.random.default_rng(3))
    return [], [Video(scene.frames(1.5), fps=1.5)], scene.questions


def turns_of(media: Media, asks: Sequence[tuple[Question, Thinking]]) -> list[dict[str, object]]:
    images, videos, _ = media
    turns: list[dict[str, object]] = []
    for question, thinking in asks:
        suffix = "" if thinking == "auto" else f"/{thinking}"
        parts = [] if turns else [{"type": "image"}] * len(images) + [{"type": "video"}] * len(videos)
        turns.append({"role": "user", "content": [*parts, {"type": "text", "text": question.text + suffix}]})
        turns.append({"role": "assistant", "content": question.reply(thinking)})
    return turns


def items_of(processor: KeyeProcessor, media: Media) -> list[Item]:
    images, videos, _ = media
    patches = [processor.image_processor.process_image(image) for image in images]
    patches += [processor.image_processor.process_video(video) for video in videos]
    nothing = [torch.full((len(p.values) // 4,), IGNORED) for p in patches]
    return [Item(torch.from_numpy(p.values), p.grids[0], n, n) for p, n in zip(patches, nothing, strict=True)]


@torch.no_grad()
def packed_logits(model: KeyeForConditionalGeneration, batch: Batch) -> torch.Tensor:
    """[targets, V], as the trainer computes them."""
    features = model.get_image_features(
        torch.cat([item.pixel_values for item in batch.items]), [item.grid for item in batch.items]
    )
    is_visual = (batch.input_ids == model.config.image_token_id) | (batch.input_ids == model.config.video_token_id)
    embeds = model.model.embed_tokens(batch.input_ids).masked_scatter(is_visual.unsqueeze(-1), features)
    hidden = model.model(embeds, batch.position_ids, attend_padded(model.model, embeds, batch.attention_mask))
    return model.lm_head(hidden[batch.targets != IGNORED])


@torch.no_grad()
def asked_logits(
    model: KeyeForConditionalGeneration, processor: KeyeProcessor, media: Media, turns: list[dict[str, object]]
) -> torch.Tensor:
    """[reply, V], as the worker computes them: the last turn's reply behind a prompt the processor made."""
    *prompt, last = turns
    prepared = processor.prepare(prompt, media[0], media[1])
    reply = torch.tensor(processor.tokenizer.encode(f"{last['content']}<|im_end|>"))
    batch = processor.pad_left([prepared])
    batch["input_ids"] = torch.cat([batch["input_ids"], reply[None, :-1]], dim=1)
    batch["second_per_grid_ts"] = prepared.second_per_grid_ts
    batch.pop("attention_mask")
    batch.pop("position_ids")
    return model(**batch, logits_to_keep=len(reply)).logits[0]


@pytest.mark.parametrize("draw", [one_image, two_images, a_video_of_another_rate])
@pytest.mark.parametrize("is_conversation", [False, True])
def test_a_packed_question_is_learnt_exactly_as_the_worker_will_ask_it(
    processor: KeyeProcessor,
    packer: Packer,
    untrained: KeyeForConditionalGeneration,
    draw: Callable[[], Media],
    is_conversation: bool,
) -> None:
    media = draw()
    fps = media[1][0].fps if media[1] else None
    asks = list(zip(media[2][1:], MODES, strict=False))
    lesson = Lesson(items_of(processor, media), asks, fps, is_conversation)
    longer = Lesson(lesson.items, list(zip(media[2], MODES * 2, strict=False)), fps)
    batch = packer.pack([longer, lesson])
    logits, asked = packed_logits(untrained, batch), batch.asked[batch.targets != IGNORED]
    for turn in range(len(asks)):
        begin = 0 if is_conversation else turn
        alone = asked_logits(untrained, processor, media, turns_of(media, asks[begin : turn + 1]))
        torch.testing.assert_close(logits[asked == len(longer.asks) + turn], alone, atol=2e-4, rtol=1e-3)


def test_targets_are_the_replies_and_nothing_else(processor: KeyeProcessor, packer: Packer) -> None:
    media = one_image()
    asks = [(question, "think") for question in media[2]]
    batch = packer.pack([Lesson(items_of(processor, media), asks)])
    for number, (question, thinking) in enumerate(asks):
        reply = batch.targets[(batch.asked == number) & (batch.targets != IGNORED)]
        assert processor.tokenizer.decode(reply) == f"{question.reply(thinking)}<|im_end|>"
        assert batch.kinds[number] == question.kind
