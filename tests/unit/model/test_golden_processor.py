"""Our processor against the outputs of the reference: exact, or within what `tests/golden/README.md` accepts."""

from typing import Any

import pytest
import torch

PIXELS = ("pixel_values", "pixel_values_videos")


@pytest.mark.holds("docs/model.md#prompt", "A turn is `<|im_start|>{role}")
def test_chat_template_renders_the_reference_text(golden_case: Any) -> None:
    texts = [golden_case.processor.prompt_format.render(messages) for messages in golden_case.conversations]
    expected = golden_case.facts["text"]
    assert texts == ([expected] if isinstance(expected, str) else expected)


@pytest.mark.holds("docs/model.md#prompt", "A placeholder is repeated t·h·w/4 times")
def test_placeholders_expand_to_the_reference_text(golden_case: Any) -> None:
    if golden_case.facts.get("expanded_text") is not None:
        assert [prompt.text for prompt in golden_case.prepare(golden_case.processor)] == [
            golden_case.facts["expanded_text"]
        ]


def test_tokens_are_the_reference_tokens(golden_case: Any) -> None:
    stored = golden_case.arrays["input_ids"]
    for row, prompt in enumerate(golden_case.prepare(golden_case.processor)):
        assert prompt.input_ids.tolist() == stored[row, golden_case.attention_mask[row]].tolist()


@pytest.mark.holds("docs/model.md#positions", "the token generated in column n stands at n + delta in all rows")
def test_positions_and_deltas_are_the_reference_ones(golden_case: Any) -> None:
    stored, deltas = golden_case.arrays["position_ids"], golden_case.arrays["rope_deltas"]
    padded_length = stored.shape[-1]
    for row, prompt in enumerate(golden_case.prepare(golden_case.processor)):
        assert torch.equal(prompt.position_ids, stored[:, row, golden_case.attention_mask[row]])
        assert prompt.rope_delta + len(prompt.input_ids) - padded_length == deltas[row].item()


@pytest.mark.holds("docs/model.md#proof", "pixels within 1e-6")
@pytest.mark.holds("docs/model.md#pixels", "by antialiased bilinear interpolation on 8 bits", "Then RGB")
def test_pixels_are_the_reference_pixels(golden_case: Any) -> None:
    prompts = golden_case.prepare(golden_case.processor)
    for name in PIXELS:
        parts = [part for prompt in prompts if (part := getattr(prompt, name)) is not None]
        assert bool(parts) == (name in golden_case.arrays)
        if parts:
            normalised = golden_case.processor.image_processor.normalise(torch.cat(parts))
            error = (normalised - golden_case.arrays[name]).abs()
            if name == "pixel_values_videos" and golden_case.has_exact_frame_sizes:
                assert error.max() <= 0.012
                assert error.mean() <= 1e-4
            else:
                assert error.max() <= 1e-6


@pytest.mark.holds("docs/model.md#pixels", "Frames of a video share the size of the first.")
def test_grids_frame_counts_and_frame_seconds_are_the_reference_ones(golden_case: Any) -> None:
    prompts = golden_case.prepare(golden_case.processor)
    for name in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts", "num_frames"):
        if name in golden_case.arrays:
            ours = torch.cat([part for prompt in prompts if (part := getattr(prompt, name)) is not None])
            stored = golden_case.arrays[name]
            assert ours.dtype == stored.dtype
            torch.testing.assert_close(ours, stored, rtol=0, atol=1e-7 if stored.is_floating_point() else 0)


@pytest.mark.holds("docs/model.md#positions", "Padding has position 1.")
def test_batch_padded_on_the_left_is_the_reference_batch(golden_case: Any) -> None:
    if golden_case.facts["padding_side"] == "right":
        return
    batch = golden_case.processor.pad_left(golden_case.prepare(golden_case.processor))
    for name in ("input_ids", "attention_mask", "position_ids", "image_grid_thw", "video_grid_thw"):
        if name in golden_case.arrays:
            assert torch.equal(batch[name], golden_case.arrays[name])
