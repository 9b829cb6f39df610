"""`KEYE_PRECISION` for a device, and what quantising leaves as it was."""

import math
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch

from keye.config.codes import PrecisionSetting
from keye.config.settings import Settings
from keye.worker.model import precision
from keye.worker.model.checkpoint import tensor_shapes
from keye.worker.model.configuration_keye import KeyeConfig
from keye.worker.model.keye import KeyeForConditionalGeneration
from keye.worker.model.load import load_model
from keye.worker.model.precision import WEIGHT_SHARE, PrecisionUnavailable, choose_precision

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.holds("docs/model.md#precision", "`KEYE_PRECISION` sets the numbers of weights, activations and cache.")
def test_every_precision_that_can_be_set_is_known() -> None:
    assert Settings.model_fields["precision"].annotation == PrecisionSetting
    for setting in get_args(PrecisionSetting):
        assert choose_precision(setting, CPU).name == {"auto": "float32"}.get(setting, setting)


@pytest.mark.holds("docs/model.md#precision", "`auto` is bfloat16, float16 on GPUs without it, float32 on a CPU.")
@pytest.mark.parametrize(("gpu_has_it", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_is_bfloat16_where_the_gpu_has_it(
    gpu_has_it: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: gpu_has_it)
    for setting in ("auto", "int8", "int4"):
        assert choose_precision(setting, GPU).dtype == expected
    assert choose_precision("auto", CPU).dtype == torch.float32


@pytest.mark.holds("docs/model.md#precision", "shrink the seven linear maps of each decoder layer")
@pytest.mark.parametrize("setting", ["int8", "int4"])
def test_only_the_decoder_is_quantised(
    setting: PrecisionSetting, preview: Path, model: KeyeForConditionalGeneration
) -> None:
    chosen = choose_precision(setting, CPU)
    quantised = load_model(preview, dtype=chosen.dtype, quantization=chosen.quantization)
    shrunk, same = [], []
    for (name, weight), plain in zip(quantised.named_parameters(), model.parameters(), strict=True):
        is_same = type(weight) is torch.nn.Parameter and torch.equal(weight, plain)
        (same if is_same else shrunk).append(name)
    assert len(shrunk) == 7 * model.config.num_hidden_layers
    assert all(name.startswith("model.layers.") and name.endswith("_proj.weight") for name in shrunk)
    assert "lm_head.weight" in same
    assert quantised.dtype == torch.float32


def test_memory_of_weights_is_as_the_shapes_of_the_8b_model_say() -> None:
    counts = {name: math.prod(shape) for name, shape in tensor_shapes(KeyeConfig().to_dict()).items()}
    total = sum(counts.values())
    quantised = sum(n for name, n in counts.items() if name.startswith("model.layers.") and "_proj." in name)
    # int4 has a float32 scale for 64 weights besides.
    for setting, num_bytes in (("int8", 1), ("int4", 0.5 + 4 / 64)):
        expected = (2 * (total - quantised) + num_bytes * quantised) / (2 * total)
        assert WEIGHT_SHARE[setting] == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(("setting", "package"), [("int8", "torchao"), ("int4", "bitsandbytes")])
def test_missing_package_is_named_with_its_cure(
    setting: PrecisionSetting, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "find_spec", lambda name: None)
    with pytest.raises(PrecisionUnavailable, match=rf"KEYE_PRECISION={setting} needs {package}.*pip install"):
        choose_precision(setting, CPU)


def test_four_bits_never_come_with_code_from_a_hub(tmp_path: Path) -> None:
    """bitsandbytes asks the package `kernels` for some, where there is one."""
    (tmp_path / "kernels.py").write_text("def get_kernel(*_, **__):\n    raise SystemExit('code was asked for')\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import kernels, torch;"
        "from keye.worker.model.precision import choose_precision;"
        "choose_precision('int4', torch.device('cpu'));"
        "assert 'bitsandbytes' in sys.modules and sys.modules['kernels'] is kernels"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])
