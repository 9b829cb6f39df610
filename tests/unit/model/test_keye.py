"""What must hold of the model beyond the golden numbers: sequences, items and callers do not disturb each other."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from keye.worker.model.image_processing import Image, Video
from keye.worker.model.keye import KeyeForConditionalGeneration
from keye.worker.model.load import load_model
from keye.worker.model.positions import PlaceholderMismatch
from keye.worker.model.processor import KeyeProcessor, PreparedPrompt

pytestmark = pytest.mark.usefixtures("without_gradients")


@pytest.fixture
def without_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def picture(seed: int, height: int = 56, width: int = 84) -> Image:
    return Image(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def clip(seed: int, frames: int = 3) -> Video:
    return Video(np.random.default_rng(seed).integers(0, 256, (frames, 56, 56, 3), dtype=np.uint8))


def prompts_of(processor: KeyeProcessor) -> list[PreparedPrompt]:
    """Text, one image, two images of two sizes, a video, a video with an image: all of different lengths."""

    def ask(kinds: list[str], images: list[Image], videos: list[Video]) -> PreparedPrompt:
        parts = [{"type": kind} for kind in kinds] + [{"type": "text", "text": "What is this?"}]
        return processor.prepare([{"role": "user", "content": parts}], images, videos)

    return [
        ask([], [], []),
        ask(["image"], [picture(1)], []),
        ask(["image", "image"], [picture(2), picture(3, 84, 112)], []),
        ask(["video"], [], [clip(4)]),
        ask(["video", "image"], [picture(5)], [clip(6, frames=5)]),
    ]


def generate(
    model: KeyeForConditionalGeneration, processor: KeyeProcessor, *prompts: PreparedPrompt, **kwargs: Any
) -> Any:
    batch = processor.pad_left(prompts)
    arguments: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, **kwargs}
    return model.generate(**batch, **arguments)[:, batch["input_ids"].shape[1] :].tolist()


@pytest.mark.holds(
    "docs/model.md#what-the-released-code-gets-wrong-and-this-does-not",
    "Right padding by default breaks batched generation: `KeyeProcessor.pad_left`.",
)
@pytest.mark.parametrize("checkpoint", ["preview", "v1_5"])
def test_mixed_batch_gives_each_row_what_it_gets_alone(checkpoint: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(checkpoint)
    model, processor = load_model(path, dtype=torch.float32), KeyeProcessor.from_checkpoint(path)
    prompts = prompts_of(processor)
    assert generate(model, processor, *prompts) == [generate(model, processor, p)[0] for p in prompts]


@pytest.mark.holds(
    "docs/model.md#what-the-released-code-gets-wrong-and-this-does-not",
    "here it travels with the sequence",
)
@pytest.mark.holds("docs/model.md#positions", "The delta belongs to the sequence")
def test_generation_in_the_middle_of_another_changes_neither(
    model: KeyeForConditionalGeneration, processor: KeyeProcessor
) -> None:
    first, second = prompts_of(processor)[2], prompts_of(processor)[3]
    alone = [generate(model, processor, prompt) for prompt in (first, second)]
    inner: list[Any] = []

    class Interrupt(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
            if not inner:
                inner.append(generate(model, processor, second))
            return torch.zeros(len(input_ids), dtype=torch.bool)

    outer = generate(model, processor, first, stopping_criteria=StoppingCriteriaList([Interrupt()]))
    assert [outer, inner[0]] == alone


@pytest.mark.parametrize("checkpoint", ["preview", "v1_5"])
def test_image_features_do_not_depend_on_the_images_beside(checkpoint: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(checkpoint)
    model, processor = load_model(path, dtype=torch.float32), KeyeProcessor.from_checkpoint(path)
    patches = [processor.image_processor.process_image(picture(n, 56 + 28 * (n % 3), 84)) for n in range(5)]
    pixels = [torch.from_numpy(p.values) for p in patches]
    together = model.get_image_features(torch.cat(pixels), [p.grids[0] for p in patches])
    alone = [model.get_image_features(x, p.grids) for x, p in zip(pixels, patches, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-6)


@pytest.mark.holds("docs/model.md#vision-tower", "An *item* is what attends to itself")
@pytest.mark.holds(
    "docs/model.md#how-the-variants-differ",
    "attention in a video | across all frames | inside each frame",
)
def test_frames_see_each_other_in_preview_and_not_in_1_5(preview: Path, v1_5: Path) -> None:
    frames = torch.rand(2 * 16, 3, 14, 14)
    changed = frames.clone()
    changed[16:] += 1
    for path, sees in ((preview, True), (v1_5, False)):
        model = load_model(path, dtype=torch.float32)
        before, after = (model.get_video_features(x, [(2, 4, 4)])[:4] for x in (frames, changed))
        assert torch.allclose(before, after, atol=1e-6) != sees


@pytest.mark.holds(
    "docs/model.md#what-the-released-code-gets-wrong-and-this-does-not",
    "Beams and several answers a prompt fail for videos: here they work for both.",
)
@pytest.mark.parametrize("strategy", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True, "top_k": 1}])
def test_beams_and_several_answers_work_for_images_and_videos(
    model: KeyeForConditionalGeneration, processor: KeyeProcessor, strategy: dict[str, Any]
) -> None:
    prompt, other = prompts_of(processor)[4], prompts_of(processor)[1]
    together = generate(model, processor, prompt, other, **strategy)
    alone = generate(model, processor, prompt, **strategy) + generate(model, processor, other, **strategy)
    assert together == alone
    if "num_return_sequences" in strategy:
        assert together[0] == together[1] == generate(model, processor, prompt)[0]


def test_prompt_that_ends_in_an_image_goes_on_from_its_longer_side(
    model: KeyeForConditionalGeneration, processor: KeyeProcessor
) -> None:
    """Each step with a cache must stand where a fresh pass over the whole text puts it."""
    image = processor.image_processor.process_image(picture(7, 56, 112))
    ids = torch.tensor([[5, 6] + [model.config.image_token_id] * 8])
    inputs = {"pixel_values": torch.from_numpy(image.values), "image_grid_thw": torch.tensor(image.grids)}
    generated = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        **inputs,
        do_sample=False,
        max_new_tokens=6,
        eos_token_id=None,
    )
    for length in range(ids.shape[1], generated.shape[1]):
        logits = model(input_ids=generated[:, :length], **inputs).logits
        assert logits[0, -1].argmax() == generated[0, length]


@pytest.mark.holds("docs/model.md#text-decoder", "asks its caller to attend")
def test_attention_of_the_caller_gets_each_layer_and_no_mask(model: KeyeForConditionalGeneration) -> None:
    seen: list[tuple[int, torch.Size, float]] = []

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        seen.append((layer, query.shape, scaling))
        return query.transpose(1, 2)

    config = model.config
    hidden = model.model(torch.zeros(1, 7, config.hidden_size), torch.zeros(3, 1, 7).long(), attend)
    assert hidden.shape == (1, 7, config.hidden_size)
    shape = torch.Size((1, config.num_attention_heads, 7, config.head_dim))
    assert seen == [(index, shape, config.head_dim**-0.5) for index in range(config.num_hidden_layers)]


def test_bfloat16_answers_and_stays_near_float32(preview: Path, processor: KeyeProcessor) -> None:
    precise, coarse = (load_model(preview, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    for prompt in prompts_of(processor):
        batch = processor.pad_left([prompt])
        expected, logits = precise(**batch).logits, coarse(**batch).logits
        assert logits.dtype == torch.bfloat16
        assert torch.nn.functional.cosine_similarity(expected[0, -1], logits[0, -1].float(), dim=0) > 0.98
        assert len(generate(coarse, processor, prompt)[0]) == 12


@pytest.mark.holds("docs/model.md#projector", "another number of them is an error")
def test_wrong_number_of_patches_is_named(model: KeyeForConditionalGeneration, processor: KeyeProcessor) -> None:
    batch = processor.pad_left([prompts_of(processor)[1]])
    batch["pixel_values"] = torch.cat([batch["pixel_values"]] * 2)
    batch["image_grid_thw"] = torch.cat([batch["image_grid_thw"]] * 2)
    with pytest.raises(PlaceholderMismatch, match="6 image placeholder tokens, but the images give 12 rows"):
        model(**batch)


def test_gradients_reach_every_weight(processor: KeyeProcessor, preview: Path) -> None:
    with torch.inference_mode(False), torch.enable_grad():
        model = load_model(preview, dtype=torch.float32).train()
        batch = processor.pad_left(prompts_of(processor))
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []
