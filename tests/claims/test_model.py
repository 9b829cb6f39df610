"""docs/model.md: its sums, sizes and names are those of the code; tests/unit/model holds the numbers themselves."""

import inspect
import json
import math
import re
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from keye_vl_utils import vision_process

from keye.config.job import VideoPart
from keye.config.settings import Settings
from keye.worker.loading import served_model
from keye.worker.model import attention_choice, image_processing, keye, vision_tower
from keye.worker.model.checkpoint import UNUSED_TENSORS, VARIANTS, tensor_shapes
from keye.worker.model.checkpoint_digest import digest_checkpoint
from keye.worker.model.configuration_keye import KeyeConfig, KeyeVL1_5Config
from keye.worker.model.load import load_model
from keye.worker.model.processor import KeyeProcessor
from keye.worker.model.prompt import FAST_END, FAST_START, FRAME
from keye.worker.model.vision_tower import Projector
from keye.worker.proof import numbers
from keye.worker.proof.golden_case import GoldenCase
from keye.worker.sizing import Sizing
from tests.support.checkout import ROOT

TEXT = " ".join((ROOT / "docs/model.md").read_text().split())
GOLDEN = ROOT / "tests/golden"
TOKEN = 28 * 28
CONFIGS = {
    name: json.loads((GOLDEN / name / "checkpoint/config.json").read_text(encoding="utf-8"))
    for name in ("preview", "v1_5")
}


@pytest.mark.holds("docs/model.md#what-model-is-this", "question | file")
def test_files_of_the_table_are_there() -> None:
    section = (ROOT / "docs/model.md").read_text().split("| question | file |")[1].split("\n\n")[0]
    named = set(re.findall(r"`([\w/]+\.py)`", section))
    assert [name for name in named if not ((ROOT / "worker/model" / name).exists() or (ROOT / name).exists())] == []
    # And none is left out that has to do with any of it.
    besides = {"__init__.py", "device.py", "device_faults.py", "padded_attention.py"}
    assert {path.name for path in (ROOT / "worker/model").glob("*.py")} == {Path(name).name for name in named} - {
        "sizing.py"
    } | besides


@pytest.mark.holds("docs/model.md#what-model-is-this", "Numbers in brackets are those of the 8B models")
@pytest.mark.holds("docs/model.md#configuration", "`head_dim` (128) is a field of its own")
@pytest.mark.holds("docs/model.md#vision-tower", "[27] layers", "[16] heads of [72]", "⌊image_size/14⌋² rows (27")
@pytest.mark.holds("docs/model.md#text-decoder", "([32] query, [8] key heads of [128])", "`mrope_section` [16,24,24]")
@pytest.mark.holds("docs/model.md#projector", "(eps 1e-5, in no config)")
def test_sizes_in_brackets_are_the_8b_models() -> None:
    config = KeyeConfig()
    vision = config.vision_config
    assert (vision.num_hidden_layers, vision.num_attention_heads) == (27, 16)
    assert vision.hidden_size // vision.num_attention_heads == 72
    assert vision.image_size // vision.patch_size == 27
    assert vision.layer_norm_eps == config.rms_norm_eps == 1e-6
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (32, 8, 128)
    assert config.rope_parameters["mrope_section"] == [16, 24, 24]
    assert not config.attention_bias
    assert not config.tie_word_embeddings
    assert (vision.patch_size, vision.spatial_merge_size, vision.tokens_per_second) == (14, 2, 2)
    with torch.device("meta"):
        assert Projector(config).pre_norm.eps == 1e-5
    assert not [name for name in ("projector_norm_eps", "norm_eps") if name in CONFIGS["preview"]]


@pytest.mark.holds("docs/model.md#how-the-variants-differ", "Preview (`Keye`) | 1.5 (`KeyeVL1_5`)")
@pytest.mark.holds(
    "docs/model.md#configuration", "`config.json` is flat", "`vision_config` calls itself a SigLIP model"
)
@pytest.mark.holds("docs/model.md#configuration", "`sliding_window` fields are leftovers.")
def test_variants_differ_as_the_table_says() -> None:
    for name, (base, context) in {"preview": (1e6, 40960), "v1_5": (8e6, 131072)}.items():
        config = CONFIGS[name]
        assert (config["rope_theta"], config["max_position_embeddings"]) == (base, context)
        assert "hidden_size" in config
        assert "text_config" not in config
        assert config["vision_config"]["model_type"] == "siglip_vision_model"
        assert config["vision_config"]["temporal_patch_size"] == 2
        # A key of Qwen's that nobody reads: whoever loads the file has forgotten it.
        assert "sliding_window" in config
        loaded = KeyeProcessor.from_checkpoint(GOLDEN / name / "checkpoint").config
        assert getattr(loaded, "sliding_window", None) is None
    assert VARIANTS == {"Keye": (False, False), "KeyeVL1_5": (True, True)}
    plain, system = (
        KeyeProcessor.from_checkpoint(GOLDEN / name / "checkpoint").prepare([{"role": "user", "content": "?"}]).text
        for name in CONFIGS
    )
    assert "system" not in plain
    assert system.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")
    assert KeyeVL1_5Config().max_position_embeddings == 131072


@pytest.mark.holds(
    "docs/model.md#prompt", "Control tokens are those the tokenizer flags special, and 1.5's frame marks."
)
@pytest.mark.holds("docs/model.md#prompt", "A turn is `<|im_start|>{role}", "Nothing is prefilled.")
def test_turns_parts_and_control_tokens_are_as_written() -> None:
    for name in CONFIGS:
        processor = KeyeProcessor.from_checkpoint(GOLDEN / name / "checkpoint")
        content = [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "?"}]
        text = processor.prompt_format.render([{"role": "user", "content": content}])
        media = "".join(f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video"))
        assert text.endswith(f"<|im_start|>user\n{media}?<|im_end|>\n<|im_start|>assistant\n")
        special = {token.content for token in processor.tokenizer.added_tokens_decoder.values() if token.special}
        marks = {FRAME, FAST_START, FAST_END} & processor.tokenizer.get_vocab().keys()
        control = processor.prompt_format._control
        assert {token for token in processor.tokenizer.get_vocab() if control.fullmatch(token)} == special | marks
        assert bool(marks) == (name == "v1_5")


PREVIEW = Sizing(28, 4 * TOKEN, 16384 * TOKEN)
SLOW_FAST = Sizing(28, 4 * TOKEN, 16384 * TOKEN, splits_video_into_frames=True)


@pytest.mark.holds("docs/model.md#frames", "Each frame may have s = 0.9·128000/n·2 tokens", "with 128 to s tokens")
@pytest.mark.holds("docs/model.md#frames", "A job's `max_pixels` and the checkpoint's lower s")
def test_frames_of_preview_have_as_many_tokens_as_written() -> None:
    # So wide and fine that the rule for sizes comes near to what it may have.
    height, width = 2800, 5600
    for num_frames in (1, 300, 301, 400, 1000, 1715, 4096):
        most = max(min(0.9 * 128_000 / num_frames * 2, 768), 1.05 * 128)
        (fitted_height, fitted_width), _ = PREVIEW.fit_frames(VideoPart(uri="/c.mp4"), num_frames, 0, height, width)
        assert 0.85 * most < fitted_height * fitted_width / TOKEN <= most
    for num_frames in (4, 4096):
        small, _ = PREVIEW.fit_frames(VideoPart(uri="/c.mp4"), num_frames, 0, 56, 112)
        assert 128 <= math.prod(small) / TOKEN < 150
        asked, _ = PREVIEW.fit_frames(VideoPart(uri="/c.mp4", min_pixels=130 * TOKEN), num_frames, 0, 56, 112)
        assert math.prod(asked) / TOKEN >= 130 or num_frames == 4096
    asked, _ = PREVIEW.fit_frames(VideoPart(uri="/c.mp4", max_pixels=50 * TOKEN), 4, 0, height, width)
    assert math.prod(asked) / TOKEN <= 50


@pytest.mark.holds("docs/model.md#frames", "Slow frames may have s tokens and fast ones max(⌊0.3·s⌋, 48)")
@pytest.mark.holds("docs/model.md#frames", "Slow frames go through the rule", "Fast frames go through it with 48 to")
@pytest.mark.holds("docs/model.md#frames", "A job's `max_pixels` takes the place of 768")
def test_slow_and_fast_frames_have_as_many_tokens_as_written() -> None:
    part = VideoPart(uri="/c.mp4")
    for num_slow, num_fast in ((1, 0), (60, 40), (85, 0), (100, 600), (500, 500), (1300, 0), (2000, 2000)):
        bursts = (s for s in range(48, 769) if num_slow * s + num_fast * max(int(0.3 * s), 48) > 65536)
        most = next(bursts, 768)
        slow, fast = SLOW_FAST.fit_frames(part, num_slow, num_fast, 3000, 4000)
        assert 0.8 * most < math.prod(slow) / TOKEN <= max(most, 50)
        fewer = max(int(0.3 * math.prod(slow) / TOKEN), 48)
        assert 0.7 * fewer < math.prod(fast) / TOKEN <= max(fewer, 50)
    for asked, least in ((20, 48), (100, 100)):
        slow, _ = SLOW_FAST.fit_frames(part.model_copy(update={"min_pixels": asked * TOKEN}), 4, 0, 28, 56)
        assert least <= math.prod(slow) / TOKEN < least + 30
    wide, _ = SLOW_FAST.fit_frames(part.model_copy(update={"max_pixels": 900 * TOKEN}), 4, 0, 2800, 5600)
    assert 768 < math.prod(wide) / TOKEN <= 900


@pytest.mark.holds("docs/model.md#frames", "is slow itself where fewer than 0.9 of the patches are alike")
@pytest.mark.holds("docs/model.md#frames", "of the frame shrunk to 48 to 256 tokens, in HSV")
def test_likeness_is_the_utilities() -> None:
    likeness = inspect.signature(vision_process.get_frame_sim).parameters
    assert (likeness["patch_size"].default, likeness["threshold"].default) == (28, 0.7)
    assert vision_process.MIN_FRAME_SIMILARITY == 0.9
    assert vision_process.VIDEO_MIN_TOKENS == image_processing.MIN_FRAME_TOKENS == 48
    black, grey = torch.zeros(3, 56, 560), torch.full((3, 56, 560), 200.0)
    half_black = torch.cat((black[..., :280], grey[..., 280:]), dim=-1)
    # Of the other half every patch is alike.
    assert vision_process.get_frame_sim(half_black, half_black) == 1
    changed = half_black.clone()
    changed[0, :, 280:] = 0
    assert vision_process.get_frame_sim(half_black, changed) < 0.9
    source = inspect.getsource(vision_process)
    assert "COLOR_RGB2HSV" in source
    assert "max_pixels=256 * IMAGE_FACTOR * IMAGE_FACTOR" in source


@pytest.mark.holds("docs/model.md#vision-tower", "At most 16,384 patches go through tower and projector in one call")
@pytest.mark.holds("docs/model.md#vision-tower", "(about 12 KiB a patch at the 8B sizes")
def test_patches_at_once_and_what_they_take() -> None:
    assert f"At most {vision_tower.MAX_PATCHES:,} patches" in TEXT
    assert f"computed {vision_tower.MAX_PATCHES // 8:,} patches at a time" in TEXT
    vision = KeyeConfig().vision_config
    # Hidden states, queries, keys, values and outputs in bfloat16, and angles in float32.
    num_bytes = 2 * 5 * vision.hidden_size + 4 * 2 * vision.hidden_size // vision.num_attention_heads
    assert round(num_bytes / 1024) == 12


@pytest.mark.holds("docs/model.md#vision-tower", "The pooling head in the files is not used")
def test_what_is_in_the_files_and_not_used() -> None:
    for name in ("head.probe", "embeddings.packing_position_embedding.weight"):
        assert re.match(UNUSED_TENSORS, f"visual.vision_model.{name}")
    assert not [name for name in tensor_shapes(CONFIGS["preview"]) if re.match(UNUSED_TENSORS, name)]


@pytest.mark.holds("docs/model.md#text-decoder", "The three hooks of `generate` that Keye overrides are in `keye.py`.")
def test_three_hooks_are_overridden() -> None:
    own = vars(keye.KeyeForConditionalGeneration).keys()
    hooks = {name for name in own if name.startswith("_") and name.endswith("_for_generation")}
    assert len(hooks) == 3


@pytest.mark.holds("docs/from-a-script.md#pixels-precision-memory", "shrinks the weights from 17.3 GB to 10.3 or 7.3")
@pytest.mark.holds("docs/model.md#precision", "weights of the 8B models | form")
def test_weights_of_the_8b_models_take_as_many_gigabytes() -> None:
    counts = {name: math.prod(shape) for name, shape in tensor_shapes(KeyeConfig().to_dict()).items()}
    total = sum(counts.values())
    shrunk = sum(n for name, n in counts.items() if name.startswith("model.layers.") and "_proj." in name)
    # A scale is a float32: of a row in int8, of 64 weights in int4.
    taken = {
        "bfloat16, float16": 2 * total,
        "int8": 2 * (total - shrunk) + shrunk,
        "int4": 2 * (total - shrunk) + shrunk * (0.5 + 4 / 64),
    }
    for name, num_bytes in taken.items():
        assert f"| {name} | {num_bytes / 1e9:.1f} GB |" in TEXT


@pytest.mark.holds("docs/model.md#proof", "a start runs those of its checkpoint's, `keye-worker doctor` all eight")
@pytest.mark.holds(
    "docs/operations.md#was-that-really-what-the-model-saw", "`model` has the digest of the checkpoint and the versions"
)
def test_a_start_proves_the_generation_of_its_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    proven: list[str] = []

    def prove(generations: object, *_: object) -> str:
        proven.extend(folder.name for folder in generations)  # type: ignore[attr-defined]
        return "proven"

    monkeypatch.setattr(served_model, "prove_numbers", prove)
    for name in ("preview", "v1_5"):
        served = served_model.load_served_model(Settings(model_path=GOLDEN / name / "checkpoint", device="cpu"))
        served.engine.stop()
        assert served.model.checkpoint == digest_checkpoint(GOLDEN / name / "checkpoint")
        told = dict(each.split("==") for each in served.model.packages)
        assert told["torch"] == version("torch")
        assert {"transformers", "tokenizers", "numpy", "pillow", "av", "keye-worker", "libavcodec"} <= told.keys()
    assert proven == ["preview", "v1_5"]
    cases = {folder.name: len(list(folder.glob("cases/*.npz"))) for folder in served_model.GENERATIONS.values()}
    assert cases == {"preview": 4, "v1_5": 4}


@pytest.mark.holds("docs/model.md#proof", "Ids, grids and positions are exact, pixels within 1e-6")
@pytest.mark.holds("docs/model.md#proof", "In half precision logits may be off by 8 steps (`eps`) of the largest logit")
@pytest.mark.holds("docs/model.md#proof", "Two `eps` are accepted, and 3e-5 in float32")
def test_bounds_of_the_proof_are_the_codes() -> None:
    assert f"pixels within {numbers.ACCEPTED_PIXEL_ERROR:.0e}".replace("e-0", "e-") in TEXT
    frame, mean = numbers.ACCEPTED_FRAME_ERROR, numbers.ACCEPTED_MEAN_FRAME_ERROR
    assert f"a grey level, {frame}, and {mean:.0e} on average".replace("e-0", "e-") in TEXT
    assert f"logits within {numbers.ACCEPTED_LOGIT_ERROR:.0e}".replace("e-0", "e-") in TEXT
    assert f"{numbers.NUM_TOKENS} greedy tokens equal" in TEXT
    assert f"off by {numbers.ACCEPTED_STEPS} steps" in TEXT
    assert attention_choice.ACCEPTED_STEPS == 2
    accepted = 2 * max(torch.finfo(torch.float32).eps, attention_choice.FINEST_STEP)
    assert f"{accepted:.0e}".replace("e-0", "e-") == "3e-5"


@pytest.mark.holds("docs/model.md#proof", "Tokens are the reference's up to where the two best logits are nearer")
@pytest.mark.parametrize(("margin", "is_told"), [(1.9, False), (2.1, True)])
def test_a_token_may_be_another_where_the_best_logits_are_near(margin: float, is_told: bool) -> None:
    (case, *_) = GoldenCase.of(served_model.GENERATIONS["Keye"])
    accepted = numbers._accepted_logit_error(case, torch.bfloat16)
    proof = numbers._Proof.__new__(numbers._Proof)
    expected = case.arrays["generated_ids"][0].tolist()
    proof._margins = {case: torch.full((len(expected),), margin * accepted)}
    proof._check_tokens(case, expected, torch.bfloat16)
    with pytest.raises(numbers.NumbersDiffer) if is_told else nullcontext():
        proof._check_tokens(case, [expected[0] + 1, *expected[1:]], torch.bfloat16)


@pytest.mark.holds("docs/model.md#proof", "Forms of attention are tried on values of 1 at most.")
def test_attention_is_tried_on_values_of_1_at_most() -> None:
    trial = attention_choice._Trial(KeyeConfig(), torch.float32, torch.device("cpu"))
    assert 0.9 < trial._values(1000, 8).abs().max() <= 1


@pytest.mark.holds(
    "docs/model.md#positions", "it is in `PreparedPrompt`, and in the positions that `generate` is given"
)
def test_nothing_of_a_sequence_is_kept_on_the_model() -> None:
    model = load_model(GOLDEN / "preview/checkpoint", dtype=torch.float32)
    processor = KeyeProcessor.from_checkpoint(GOLDEN / "preview/checkpoint")
    before = set(vars(model)) | set(vars(model.model))
    prompt = processor.prepare([{"role": "user", "content": "?"}])
    assert isinstance(prompt.rope_delta, int)
    batch = processor.pad_left([prompt])
    assert batch["position_ids"].shape[0] == 3
    model.generate(**batch, do_sample=False, max_new_tokens=2)
    assert set(vars(model)) | set(vars(model.model)) == before
    assert not [name for name in before if "delta" in name]
