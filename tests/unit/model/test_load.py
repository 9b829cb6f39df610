"""Checkpoint folders as they come: official, sharded, saved again, and broken in every way we could think of."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from keye.worker.model.checkpoint import check_checkpoint, tensor_shapes
from keye.worker.model.configuration_keye import KeyeConfig, KeyeVL1_5Config
from keye.worker.model.keye import KeyeForConditionalGeneration, KeyeVL1_5ForConditionalGeneration
from keye.worker.model.load import CheckpointFault, load_model
from keye.worker.model.processor import KeyeProcessor

WEIGHTS = "model.safetensors"


@pytest.fixture
def checkpoint(preview: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(preview, tmp_path / "checkpoint"))


def rewrite_weights(checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(checkpoint / WEIGHTS)
    change(tensors)
    save_file(tensors, checkpoint / WEIGHTS)


def rewrite_config(checkpoint: Path, **fields: Any) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | fields))


def logits_of(model: KeyeForConditionalGeneration) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.arange(20).unsqueeze(0)).logits


def test_each_variant_loads_as_itself_in_evaluation_mode(preview: Path, v1_5: Path) -> None:
    assert type(load_model(preview)) is KeyeForConditionalGeneration
    assert type(load_model(v1_5)) is KeyeVL1_5ForConditionalGeneration
    assert not load_model(preview).training


def test_dtype_is_the_checkpoints_own_unless_asked(preview: Path) -> None:
    assert load_model(preview).dtype == torch.float32
    assert load_model(preview, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_expected_tensors_are_those_of_the_model(golden_checkpoint: Path) -> None:
    model = load_model(golden_checkpoint)
    expected = tensor_shapes(json.loads((golden_checkpoint / "config.json").read_text()))
    assert expected == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.holds("docs/model.md#weights", "Names are the released ones; `tensor_shapes` lists each with its shape.")
@pytest.mark.parametrize("config", [KeyeConfig(), KeyeVL1_5Config()], ids=["preview", "1.5"])
def test_expected_tensors_are_those_of_the_model_at_its_released_size(config: KeyeConfig) -> None:
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    assert tensor_shapes(config.to_dict()) == {name: tuple(x.shape) for name, x in model.state_dict().items()}


def test_whole_checkpoint_has_no_faults(golden_checkpoint: Path) -> None:
    assert check_checkpoint(golden_checkpoint) == []


@pytest.mark.holds(
    "README.md#run-a-worker", "It reads the official Preview and 1.5 checkpoints as they are, runs no code from them"
)
@pytest.mark.holds("docs/from-a-script.md#which-generations-run", "Keye-VL-8B-Preview and Keye-VL-1.5-8B, natively")
@pytest.mark.holds("docs/design.md#decisions", "The architecture is a `transformers` `PreTrainedModel`")
@pytest.mark.holds("docs/model.md#what-model-is-this", "No code from a checkpoint is executed.")
def test_auto_class_loads_our_model_and_no_code_from_the_folder(preview: Path) -> None:
    assert type(AutoModelForImageTextToText.from_pretrained(preview)) is KeyeForConditionalGeneration


@pytest.mark.holds("docs/model.md#weights", "raises `CheckpointFault` with the same list")
def test_missing_left_over_and_misshapen_tensors_are_all_named_at_once(checkpoint: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.1.self_attn.q_norm.weight"]
        tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(2, 2)
        tensors["mlp_AR.pre_norm.weight"] = torch.zeros(7)

    rewrite_weights(checkpoint, spoil)
    with pytest.raises(CheckpointFault) as caught:
        load_model(checkpoint)
    assert sorted(caught.value.faults) == [
        "tensor mlp_AR.pre_norm.weight has the shape [7], config.json asks for [48]",
        "tensor model.layers.1.self_attn.q_norm.weight [16] is missing",
        "tensor model.layers.9.mlp.up_proj.weight [2, 2] is in the files but not in the model",
    ]


@pytest.mark.holds("docs/model.md#weights", "Files are safetensors, single or sharded.")
def test_sharded_checkpoint_gives_the_same_logits(preview: Path, checkpoint: Path) -> None:
    model = load_model(preview)
    (checkpoint / WEIGHTS).unlink()
    model.save_pretrained(checkpoint, max_shard_size="200KB")
    assert len(list(checkpoint.glob("model-*.safetensors"))) > 2
    assert torch.equal(logits_of(load_model(checkpoint)), logits_of(model))


def test_missing_shard_is_named(preview: Path, checkpoint: Path) -> None:
    (checkpoint / WEIGHTS).unlink()
    load_model(preview).save_pretrained(checkpoint, max_shard_size="200KB")
    shards = sorted(checkpoint.glob("model-*.safetensors"))
    shards[1].unlink()
    assert check_checkpoint(checkpoint) == [f"weight shard 2 of {len(shards)}, {shards[1].name}, is missing"]


@pytest.mark.holds("docs/model.md#weights", "`check_checkpoint(path)` reads headers only and returns every fault")
@pytest.mark.parametrize(
    ("keep", "words"),
    [(4, "not a safetensors file"), (1000, "cut off inside its header"), (100_000, "cut off at 100000")],
)
def test_cut_off_weights_are_noticed_without_reading_them(checkpoint: Path, keep: int, words: str) -> None:
    whole = (checkpoint / WEIGHTS).read_bytes()
    (checkpoint / WEIGHTS).write_bytes(whole[:keep])
    (fault,) = check_checkpoint(checkpoint)
    assert words in fault


@pytest.mark.holds("docs/model.md#weights", "Files are safetensors")
def test_pickled_weights_are_not_read(checkpoint: Path) -> None:
    (checkpoint / WEIGHTS).rename(checkpoint / "pytorch_model.bin")
    (fault,) = check_checkpoint(checkpoint)
    assert "only safetensors are read" in fault


def test_missing_small_files_are_named_together(checkpoint: Path) -> None:
    for name in ("preprocessor_config.json", "generation_config.json", "tokenizer.json", "vocab.json"):
        (checkpoint / name).unlink()
    faults = check_checkpoint(checkpoint)
    assert [fault.split(" in ")[0] for fault in faults] == [
        "preprocessor_config.json is missing",
        "generation_config.json is missing",
        "no tokenizer.json and no vocab.json with merges.txt",
    ]


def test_text_models_template_alone_is_a_fault(checkpoint: Path) -> None:
    (checkpoint / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages[0].content }}"}))
    (fault,) = check_checkpoint(checkpoint)
    assert "no chat template" in fault


def test_tied_embeddings_need_no_head_in_the_files(checkpoint: Path) -> None:
    rewrite_config(checkpoint, tie_word_embeddings=True)
    rewrite_weights(checkpoint, lambda tensors: tensors.pop("lm_head.weight"))
    model = load_model(checkpoint)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_folder_that_is_not_there_is_one_fault(tmp_path: Path) -> None:
    with pytest.raises(CheckpointFault, match="is not a directory"):
        load_model(tmp_path / "nowhere")


def test_config_of_another_width_is_noticed_before_loading(checkpoint: Path) -> None:
    rewrite_config(checkpoint, vocab_size=500)
    assert check_checkpoint(checkpoint) == [
        f"tensor {name} has the shape [416, 64], config.json asks for [500, 64]"
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    ]


@pytest.mark.parametrize("variant", ["preview", "v1_5"])
def test_saved_model_loads_again_the_same(variant: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    source = request.getfixturevalue(variant)
    model, processor = load_model(source), KeyeProcessor.from_checkpoint(source)
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    for name in ("chat_template.json", "added_tokens.json", "special_tokens_map.json", "vocab.json", "merges.txt"):
        (tmp_path / name).unlink()
    model.save_pretrained(tmp_path)
    processor.tokenizer.chat_template = processor.prompt_format.chat_template
    try:
        processor.tokenizer.save_pretrained(tmp_path)
    finally:
        processor.tokenizer.chat_template = None
    assert torch.equal(logits_of(load_model(tmp_path)), logits_of(model))
    messages = [{"role": "user", "content": "Is this <think> the same?"}]
    again = KeyeProcessor.from_checkpoint(tmp_path).prepare(messages)
    assert again.input_ids.tolist() == processor.prepare(messages).input_ids.tolist()


@pytest.mark.holds("docs/model.md#configuration", "Rotary settings are written in three dialects")
@pytest.mark.parametrize(
    "dialect",
    [
        {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, "rope_theta": 5e5},
        {"rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [2, 3, 3]}, "rope_theta": 5e5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [2, 3, 3]}},
    ],
    ids=["official", "saved by transformers 4", "saved by transformers 5"],
)
def test_every_dialect_of_rotary_settings_means_the_same(dialect: dict[str, Any]) -> None:
    config = KeyeConfig(head_dim=16, **dialect)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [2, 3, 3]}


@pytest.mark.holds("docs/model.md#configuration", "other rotary types are refused")
@pytest.mark.parametrize(
    ("scaling", "words"),
    [({"type": "yarn", "mrope_section": [2, 3, 3]}, "'yarn'"), ({"type": "mrope", "mrope_section": [2, 3, 4]}, "= 8")],
)
def test_rotary_settings_the_model_does_not_have_are_refused(scaling: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        KeyeConfig(head_dim=16, rope_scaling=scaling)


@pytest.mark.holds("docs/model.md#what-model-is-this", "`checkpoint.py` (without torch), `load.py`")
def test_checking_a_checkpoint_loads_no_torch(preview: Path) -> None:
    code = (
        "import sys; from keye.worker.model.checkpoint import check_checkpoint; "
        f"assert check_checkpoint({str(preview)!r}) == []; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
