"""Our model against the outputs of the reference in float32, fed with the stored processor outputs."""

from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.usefixtures("without_gradients")

NUM_NEW_TOKENS = 24


@pytest.fixture
def without_gradients() -> Any:
    with torch.inference_mode():
        yield


def assert_near(ours: Tensor, stored: Tensor, accepted: float) -> None:
    assert ours.shape == stored.shape
    error = (ours - stored).abs().max().item()
    assert error <= accepted, f"max abs error {error:.2e}, accepted {accepted:.0e}"


def items_of(golden_case: Any, kind: str) -> tuple[Tensor, list[list[int]]] | None:
    """Stored patches of the images or videos of a case and the grids of its items of attention."""
    arrays = golden_case.arrays
    pixels = arrays.get({"image": "pixel_values", "video": "pixel_values_videos"}[kind])
    if pixels is None:
        return None
    grids = arrays[f"{kind}_grid_thw"].tolist()
    if kind == "video" and golden_case.model.config.splits_video_into_frames:
        grids = [[1, h, w] for t, h, w in grids for _ in range(t)]
    return pixels, grids


@pytest.mark.holds("docs/model.md#vision-tower", "A linear map of the patch")
@pytest.mark.parametrize("kind", ["image", "video"])
def test_patch_embeddings_match(golden_case: Any, kind: str) -> None:
    stored = golden_case.arrays.get(f"{kind}_patch_embeddings")
    if stored is not None:
        assert_near(golden_case.model.visual.vision_model.embeddings(*items_of(golden_case, kind)), stored, 1e-5)


@pytest.mark.holds(
    "docs/model.md#vision-tower",
    "[27] layers: x += out(attention(LN(x)))",
    "Biases everywhere",
    "Rotary embedding on queries and keys, in float32",
    "Rows and columns start again in each frame.",
    "A final layer norm.",
)
@pytest.mark.parametrize("kind", ["image", "video"])
def test_vision_tower_matches(golden_case: Any, kind: str) -> None:
    stored = golden_case.arrays.get(f"{kind}_vision_hidden")
    if stored is not None:
        assert_near(golden_case.model.visual(*items_of(golden_case, kind)), stored, 1e-5)


@pytest.mark.holds(
    "docs/model.md#projector",
    "are joined to 4D; linear",
    "comes before the join in Preview, after it in 1.5",
)
def test_image_and_video_features_match(golden_case: Any) -> None:
    arrays, model = golden_case.arrays, golden_case.model
    if "image_embeds" in arrays:
        ours = model.get_image_features(arrays["pixel_values"], arrays["image_grid_thw"])
        assert_near(ours, arrays["image_embeds"], 1e-5)
    if "video_embeds" in arrays:
        ours = model.get_video_features(arrays["pixel_values_videos"], arrays["video_grid_thw"])
        assert_near(ours, arrays["video_embeds"], 1e-5)


def test_positions_of_a_padded_batch_match(golden_case: Any) -> None:
    inputs = golden_case.model_inputs()
    names = ("input_ids", "attention_mask", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    positions, deltas = golden_case.model.positions(*(inputs.get(name) for name in names))
    assert torch.equal(positions, golden_case.arrays["position_ids"])
    assert torch.equal(deltas, golden_case.arrays["rope_deltas"])


@pytest.mark.holds("docs/design.md#decisions", "It is held to golden numbers of the reference in `tests/golden`.")
@pytest.mark.holds(
    "docs/model.md#text-decoder",
    "Qwen3: RMS norms (eps 1e-6), no biases",
    "Rotary: head_dim/2 frequencies",
    "by `config._attn_implementation`",
)
@pytest.mark.holds(
    "docs/model.md#what-model-is-this",
    "`worker/model/` implements it for current transformers and reads the released checkpoint folders",
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_match(golden_case: Any, attention: str) -> None:
    arrays, model, mask = golden_case.arrays, golden_case.model, golden_case.attention_mask
    model.set_attn_implementation(attention)
    try:
        logits = model(**golden_case.model_inputs("position_ids")).logits
    finally:
        model.set_attn_implementation("sdpa")
    if "logits" in arrays:
        assert_near(logits[mask], arrays["logits"][mask], 2e-4)
    if "logits_tail" in arrays:
        columns = arrays["logits_tail"].shape[1]
        assert_near(logits[:, -columns:][mask[:, -columns:]], arrays["logits_tail"][mask[:, -columns:]], 2e-4)
    last = mask.shape[1] - 1 - mask.flip(1).int().argmax(dim=1)
    assert_near(logits[torch.arange(len(logits)), last], arrays["last_logits"], 2e-4)


def test_greedy_tokens_match(golden_case: Any) -> None:
    if golden_case.facts["padding_side"] == "right" or "generated_ids" not in golden_case.arrays:
        return  # generation from rows padded on the right is wrong by design; the end-to-end test pads on the left
    inputs = golden_case.model_inputs()
    generated = golden_case.model.generate(**inputs, do_sample=False, max_new_tokens=NUM_NEW_TOKENS)
    assert generated[:, inputs["input_ids"].shape[1] :].tolist() == golden_case.arrays["generated_ids"].tolist()


def test_messages_to_greedy_tokens_match_end_to_end(golden_case: Any) -> None:
    if "generated_ids" not in golden_case.arrays:
        return
    batch = golden_case.processor.pad_left(golden_case.prepare(golden_case.processor))
    generated = golden_case.model.generate(**batch, do_sample=False, max_new_tokens=NUM_NEW_TOKENS)
    new_ids = generated[:, batch["input_ids"].shape[1] :]
    assert new_ids.tolist() == golden_case.arrays["generated_ids"].tolist()
    texts = golden_case.processor.tokenizer.batch_decode(new_ids)
    assert texts == golden_case.facts["generated_text"]
