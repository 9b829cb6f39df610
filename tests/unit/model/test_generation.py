"""What `generate` of the installed transformers has to do with us: the hooks it calls, and the name of its cache."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from keye.worker.model import padded_attention
from keye.worker.model.image_processing import Image
from keye.worker.model.keye import KeyeForConditionalGeneration
from keye.worker.model.load import load_model
from keye.worker.model.processor import KeyeProcessor


@pytest.fixture
def model(preview: Path) -> KeyeForConditionalGeneration:
    return load_model(preview, dtype=torch.float32)


@pytest.fixture
def batch(processor: KeyeProcessor) -> dict[str, Any]:
    picture = Image(np.random.default_rng(0).integers(0, 256, (56, 84, 3), dtype=np.uint8))
    content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    return processor.pad_left([processor.prepare([{"role": "user", "content": content}], [picture], [])])


def generate(model: KeyeForConditionalGeneration, batch: dict[str, Any], **options: Any) -> list[list[int]]:
    answers = model.generate(**batch, do_sample=False, max_new_tokens=8, eos_token_id=None, **options)
    return answers[:, batch["input_ids"].shape[1] :].tolist()


@torch.inference_mode()
def by_fresh_passes(model: KeyeForConditionalGeneration, batch: dict[str, Any]) -> list[int]:
    """Each token from a pass over all before it, without a cache: what `generate` must come to."""
    ids = batch["input_ids"]
    pixels = {name: batch[name] for name in ("pixel_values", "image_grid_thw")}
    for _ in range(8):
        ids = torch.cat([ids, model(input_ids=ids, **pixels).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, batch["input_ids"].shape[1] :].tolist()


def test_generate_finds_positions_by_the_hook_that_prepares_them(
    model: KeyeForConditionalGeneration, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    del batch["position_ids"]
    assert generate(model, batch) == [by_fresh_passes(model, batch)]
    prompts = spy(monkeypatch, "_prepare_position_ids_for_generation")
    generate(model, batch)
    assert len(prompts) == 1
    assert prompts[0].shape == (3, *batch["input_ids"].shape)


def test_generate_goes_on_by_the_hook_that_moves_positions(
    model: KeyeForConditionalGeneration, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Ends in a picture, behind which the three rows differ.
    end = int((batch["input_ids"] == model.config.image_token_id).nonzero()[-1, 1]) + 1
    for name in ("input_ids", "attention_mask", "position_ids"):
        batch[name] = batch[name][..., :end]
    steps = spy(monkeypatch, "_update_model_kwargs_for_generation")
    assert generate(model, batch) == [by_fresh_passes(model, batch)]
    assert len(steps) >= 7
    for step in steps:
        newest = step["position_ids"][:, 0, -1]
        assert (newest == newest[0]).all()


def test_generate_repeats_prompts_by_the_hook_that_expands_them(
    model: KeyeForConditionalGeneration, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    expansions = spy(monkeypatch, "_expand_inputs_for_generation")
    beams = generate(model, batch, num_beams=2, num_return_sequences=2)
    assert len(beams) == 2
    (_, expanded), *_ = expansions
    assert "pixel_values" not in expanded
    assert expanded["inputs_embeds"].shape[0] == expanded["position_ids"].shape[1] == 2


def spy(monkeypatch: pytest.MonkeyPatch, hook: str) -> list[Any]:
    """What the hook returns from now on, call by call; empty where `generate` calls it no more."""
    returned: list[Any] = []
    overridden = getattr(KeyeForConditionalGeneration, hook)

    def call(*args: Any, **kwargs: Any) -> Any:
        result = overridden(*args, **kwargs)
        returned.append(dict(result) if isinstance(result, dict) else result)
        return result

    monkeypatch.setattr(KeyeForConditionalGeneration, hook, call)
    return returned


@pytest.mark.holds("docs/model.md#text-decoder", "refuses arguments it does not know")
@pytest.mark.parametrize("name", ["kv_cache", "state", "output_attentions"])
def test_an_argument_the_model_does_not_know_is_refused(
    model: KeyeForConditionalGeneration, batch: dict[str, Any], name: str
) -> None:
    with pytest.raises(TypeError, match=name):
        model(**batch, **{name: DynamicCache(config=model.config)})


@pytest.mark.holds("docs/model.md#text-decoder", "would make `generate` answer garbage without a word")
def test_a_cache_under_a_new_name_ends_generate_instead_of_garbling_its_answer(
    model: KeyeForConditionalGeneration, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the next release may do it: the arguments of every step are what they were, but for one name."""
    prepare = KeyeForConditionalGeneration.prepare_inputs_for_generation

    def renamed(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = prepare(self, *args, **kwargs)
        names = {"cache": "memory", "past_key_values": "memory"}
        return {names.get(name, name): value for name, value in inputs.items()}

    monkeypatch.setattr(KeyeForConditionalGeneration, "prepare_inputs_for_generation", renamed)
    with pytest.raises(TypeError, match="memory"):
        generate(model, batch)


@pytest.mark.holds("docs/model.md#text-decoder", "`forward` takes a cache by either name")
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_is_taken_under_the_name_of_any_supported_release(
    model: KeyeForConditionalGeneration, batch: dict[str, Any], name: str
) -> None:
    with torch.inference_mode():
        cache = DynamicCache(config=model.config)
        model(**batch, **{name: cache})
        assert cache.get_seq_length() == batch["input_ids"].shape[1]
        with pytest.raises(ValueError, match="two names of the same"):
            model(**batch, cache=cache, past_key_values=cache)


def test_a_mask_maker_with_renamed_arguments_makes_the_same_mask(
    model: KeyeForConditionalGeneration, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    make, expected = padded_attention.create_causal_mask, generate(model, batch)

    def renamed(settings: Any, embeds: Any, padding: Any, memory: Any, /) -> Any:
        return make(settings, embeds, padding, memory)

    monkeypatch.setattr(padded_attention, "create_causal_mask", renamed)
    assert generate(model, batch) == expected
