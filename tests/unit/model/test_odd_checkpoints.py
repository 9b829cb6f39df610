"""Files of a checkpoint folder that hold anything at all: each is told in one sentence, at once."""

import json
import os
import shutil
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from keye.worker.daemon.cli import app
from keye.worker.daemon.exit_codes import ExitCode
from keye.worker.daemon.planning import CheckpointFacts
from keye.worker.daemon.preflight import check_model_files
from keye.worker.model.checkpoint import check_checkpoint
from keye.worker.model.load import CheckpointFault, load_model

OBJECTS = ("config.json", "generation_config.json", "preprocessor_config.json", "tokenizer_config.json")
INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
NAN, INFINITY = float("nan"), float("inf")


@pytest.fixture
def checkpoint(preview: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(preview, tmp_path / "checkpoint"))


def told(checkpoint: Path) -> str:
    """What is wrong, in one sentence and at once."""
    began = time.thread_time()
    (fault,) = check_checkpoint(checkpoint)
    assert time.thread_time() - began < 1
    assert "\n" not in fault
    assert len(fault) < 1000
    assert check_model_files(checkpoint).found == fault
    with pytest.raises(CheckpointFault) as caught:
        load_model(checkpoint)
    assert caught.value.faults == [fault]
    return fault


def a_folder(file: Path) -> None:
    file.mkdir()


def a_gigabyte(file: Path) -> None:
    with file.open("wb") as hollow:
        hollow.truncate(2**30)


def a_pipe(file: Path) -> None:
    os.mkfifo(file)


def writing(content: str | bytes) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(content.encode() if isinstance(content, str) else content)


@pytest.mark.holds("docs/model.md#weights", "Whatever the folder holds, the answer comes within a second")
@pytest.mark.parametrize("name", [*OBJECTS, INDEX])
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (a_folder, "is no regular file"),
        (a_pipe, "is no regular file"),
        (a_gigabyte, "has 1,073,741,824 bytes, the limit is"),
        (writing("[]"), "holds [], expected an object"),
        (writing("null"), "holds None, expected an object"),
        (writing("7"), "holds 7, expected an object"),
        (writing("NaN"), "holds nan, expected an object"),
        (writing('"a"'), "holds 'a', expected an object"),
        (writing("[" * 100_000), "is nested too deeply"),
        (writing('{"a":' * 100_000 + "0" + "}" * 100_000), "is nested too deeply"),
        (writing(""), "is no JSON"),
        (writing("{"), "is no JSON"),
        (writing('{"a": ' + "9" * 5000 + "}"), "is no JSON"),
        (writing(b"\x89PNG\r\n\x1a\n\xff"), "is no text in UTF-8"),
        (writing(b"\0" * 99), "is no JSON"),
    ],
)
def test_a_file_that_is_no_object_is_told(
    checkpoint: Path, name: str, make: Callable[[Path], object], words: str
) -> None:
    if name == INDEX and make in (a_folder, a_pipe):
        pytest.skip("the weights are then looked for in one file")
    (checkpoint / name).unlink(missing_ok=True)
    make(checkpoint / name)
    tracemalloc.start()
    try:
        fault = told(checkpoint)
        assert tracemalloc.get_traced_memory()[1] < 2**27
    finally:
        tracemalloc.stop()
    assert fault.startswith(f"{name} in {checkpoint} {words}")


def changed(checkpoint: Path, name: str, field: str, value: Any) -> None:
    written = json.loads((checkpoint / name).read_text())
    *way, last = field.split(".")
    held = written
    for step in way:
        held = held[step]
    held[last] = value
    (checkpoint / name).write_text(json.dumps(written))


SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
SIZES += ("num_key_value_heads", "max_position_embeddings", *(f"vision_config.{name}" for name in SIZES[1:5]))
SIZES += ("vision_config.image_size", "vision_config.patch_size", "vision_config.spatial_merge_size")
ODD_SIZES = (10**9, 10**400, 0, -1, 1.5, NAN, INFINITY, "3", "many", None, True, [], {})


@pytest.mark.parametrize(
    ("name", "field", "values"),
    [
        *(("config.json", field, ODD_SIZES) for field in SIZES),
        ("config.json", "vision_config", (None, [], 7, "a")),
        ("config.json", "rms_norm_eps", (0, NAN, -1, "1e-6", None)),
        ("config.json", "tie_word_embeddings", ("false", 0, None)),
        ("config.json", "image_token_id", ("a", -1, 2**60, None)),
        ("config.json", "rope_theta", ("a", NAN, -1, [])),
        ("config.json", "rope_scaling", ("a", [1], 7)),
        ("generation_config.json", "temperature", (NAN, -1, "hot", [], INFINITY)),
        ("generation_config.json", "top_p", (NAN, -1, 2, "a")),
        ("generation_config.json", "top_k", (-1, 0.5, "a", 2**70)),
        ("generation_config.json", "repetition_penalty", (NAN, -1, "a")),
        ("generation_config.json", "do_sample", ("yes", 1)),
        ("generation_config.json", "eos_token_id", ("a", [None], {}, 2**60)),
        ("preprocessor_config.json", "patch_size", ODD_SIZES),
        ("preprocessor_config.json", "merge_size", ODD_SIZES),
        ("preprocessor_config.json", "min_pixels", (0, "a", 2**60)),
        ("preprocessor_config.json", "image_mean", (None, 0.5, [0.5], ["a"] * 3, [NAN] * 3)),
        ("preprocessor_config.json", "image_std", ([0.5, 0.5, 0],)),
        ("preprocessor_config.json", "resample", (9, "bicubic")),
        ("preprocessor_config.json", "rescale_factor", (0, "a")),
    ],
)
def test_a_value_that_cannot_be_is_told_with_its_bounds(
    checkpoint: Path, name: str, field: str, values: tuple[Any, ...]
) -> None:
    for value in values:
        changed(checkpoint, name, field, value)
        fault = told(checkpoint)
        assert fault.startswith(f"{name} in {checkpoint}")
        assert field.rpartition(".")[2] in fault
        assert "expected" in fault


@pytest.mark.parametrize("name", OBJECTS[:3])
def test_what_is_missing_is_told(checkpoint: Path, name: str) -> None:
    (checkpoint / name).write_text("{}")
    faults = check_checkpoint(checkpoint)
    # Sampling may be left open.
    assert len(faults) == (name != "generation_config.json")


@pytest.mark.parametrize("model_type", [None, [], {}, 7, "llava", "qwen2_5_vl"])
def test_a_model_of_another_family_is_told(checkpoint: Path, model_type: Any) -> None:
    (checkpoint / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert told(checkpoint) == (
        f"config.json in {checkpoint} names the model type {model_type!r}, which is no Keye-VL; this release runs "
        "Preview and 1.5 of Keye-VL (model types Keye and KeyeVL1_5)"
    )


@pytest.mark.holds("docs/from-a-script.md#which-generations-run", "Keye-VL 2.0 is another architecture")
@pytest.mark.holds("docs/model.md#weights", "Keye-VL 2.0 is another architecture")
@pytest.mark.parametrize(
    ("model_type", "architecture"),
    [
        ("KeyeVL2", "KeyeVL2MoeForConditionalGeneration"),
        ("keye_vl_2", None),
        ("KeyeVL3_5", None),
        ("deepseek_v3", "KeyeForConditionalGeneration"),
        (None, "KeyeVL2ForConditionalGeneration"),
    ],
)
def test_another_generation_is_told_and_nothing_else_of_its_folder(
    tmp_path: Path, model_type: str | None, architecture: str | None
) -> None:
    """As one of 2.0 is: nothing else that our rules ask for stands in its folder."""
    config = {"model_type": model_type, "architectures": [architecture], "text_config": {"num_experts": 128}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert told(tmp_path) == (
        f"config.json in {tmp_path} names the model type {model_type!r}, which is Keye-VL 2.0 or another generation: "
        "that is another architecture; this release runs Preview and 1.5 of Keye-VL (model types Keye and KeyeVL1_5)"
    )
    environ = {"KEYE_MODEL_PATH": str(tmp_path), "KEYE_REDIS_URL": "redis://127.0.0.1:1/0"}
    answer = CliRunner().invoke(app, ["doctor", "--json"], env=environ)
    faults = {f["subject"]: f["found"] for f in map(json.loads, answer.stdout.splitlines())}
    assert answer.exit_code == ExitCode.PREFLIGHT_FAILED
    assert faults["checkpoint"] == told(tmp_path)


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": []},
        {"type": "yarn"},
        *({"mrope_section": s} for s in (None, 7, "a", [1], ["a"] * 3, [2, 3, NAN], [1e9] * 3)),
    ],
)
def test_rotary_settings_that_cannot_be_are_told(checkpoint: Path, scaling: dict[str, Any]) -> None:
    changed(checkpoint, "config.json", "rope_scaling", scaling)
    assert told(checkpoint).startswith(f"config.json in {checkpoint}: ")


@pytest.mark.parametrize(
    "index",
    [{}, {"weight_map": []}, {"weight_map": {"a": 1}}, {"weight_map": {"a": "../a"}}, {"weight_map": {"a": []}}],
)
def test_an_index_that_names_no_files_is_told(checkpoint: Path, index: Any) -> None:
    (checkpoint / INDEX).write_text(json.dumps(index))
    assert told(checkpoint).startswith(f"{INDEX} in {checkpoint} has no weight_map")


@pytest.mark.parametrize(
    "header",
    [
        *("[]", "7", "[" * 100_000, '{"a": 7}', '{"a": {}}', '{"a": {"shape": 7, "data_offsets": [0, 1]}}', "\xff"),
        *('{"a": {"shape": ["b"], "data_offsets": [0, 1]}}', '{"a": {"shape": [1], "data_offsets": ["a", "b"]}}'),
    ],
)
def test_weights_whose_header_makes_no_sense_are_told(checkpoint: Path, header: str) -> None:
    written = header.encode("latin-1")
    (checkpoint / WEIGHTS).write_bytes(struct.pack("<Q", len(written)) + written)
    assert "its header names no tensors" in told(checkpoint)


def test_a_header_larger_than_any_is_not_read(checkpoint: Path) -> None:
    with (checkpoint / WEIGHTS).open("r+b") as file:
        file.write(struct.pack("<Q", 2**29))
        file.truncate(2**30)
    assert "its header has 536,870,912 bytes, the limit is 16,777,216" in told(checkpoint)


@pytest.mark.parametrize(
    "make", [a_gigabyte, a_folder, writing("[]"), writing("[" * 100_000), writing("{}"), writing(b"\xff")]
)
def test_a_vocabulary_that_makes_no_sense_is_told_by_loading(checkpoint: Path, make: Callable[[Path], object]) -> None:
    (checkpoint / "tokenizer.json").unlink()
    make(checkpoint / "tokenizer.json")
    with pytest.raises(CheckpointFault) as caught:
        load_model(checkpoint)
    assert "tokenizer" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_thousand_faults_are_told_in_short(checkpoint: Path) -> None:
    changed(checkpoint, "config.json", "num_hidden_layers", 1000)
    assert len(check_model_files(checkpoint).found) < 5000
    with pytest.raises(CheckpointFault, match=r"and 109\d\d more"):
        load_model(checkpoint)


@pytest.mark.parametrize("content", ["[]", "[" * 100_000, '{"model_type": "Keye", "num_hidden_layers": 1000000000}'])
def test_the_commands_tell_it_without_a_traceback(
    checkpoint: Path, redis_url: str, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    (checkpoint / "config.json").write_text(content)
    environ = {"KEYE_REDIS_URL": redis_url, "KEYE_MODEL_PATH": str(checkpoint), "KEYE_DEVICE": "cpu"}
    environ["AWS_EC2_METADATA_DISABLED"] = "true"
    answer = CliRunner().invoke(app, ["doctor", "--json"], env=environ, catch_exceptions=False)
    findings = {finding["subject"]: finding for finding in map(json.loads, answer.stdout.splitlines())}
    assert answer.exit_code == ExitCode.PREFLIGHT_FAILED
    assert findings["checkpoint"]["found"].startswith(f"config.json in {checkpoint}")
    assert "Traceback" not in answer.output
    answer = CliRunner().invoke(app, ["plan"], env=environ, catch_exceptions=False)
    assert answer.exit_code == ExitCode.PREFLIGHT_FAILED
    with pytest.raises(ValueError, match=r"^config\.json in "):
        CheckpointFacts.read(checkpoint)
    assert not [record for record in caplog.records if record.exc_info]
