"""What numbers a model is held and computed in: `KEYE_PRECISION` made concrete for a device."""

import importlib
import logging
import sys
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from transformers import BitsAndBytesConfig, TorchAoConfig

from keye.config.codes import QUANTISED_BY, PrecisionSetting
from keye.config.faults import install_command

Quantization = TorchAoConfig | BitsAndBytesConfig

# The memory of the 8B models' weights, in the bytes of their bfloat16 files.
WEIGHT_SHARE: dict[PrecisionSetting, float] = {
    "auto": 1,
    "bfloat16": 1,
    "float16": 1,
    "float32": 2,
    "int8": 0.6,
    "int4": 0.42,
}

# An eighth of the 8B model's weights, and all that it sees and says passes through them.
_UNQUANTISED = ["visual", "mlp_AR", "lm_head"]


class PrecisionUnavailable(Exception):
    """The package that a quantised precision needs is not installed."""


@dataclass(frozen=True, slots=True)
class Precision:
    """`dtype` is that of activations, of the cache, and of the weights that `quantization` does not shrink."""

    name: str
    dtype: torch.dtype
    quantization: Quantization | None = None


def choose_precision(asked: PrecisionSetting, device: torch.device) -> Precision:
    """`auto` is what the checkpoints were trained in where the GPU has it, and exact on a CPU.

    Raises `PrecisionUnavailable`.
    """
    dtype = _native_dtype(device)
    if package := QUANTISED_BY.get(asked):
        _require(package, asked)
    match asked:
        case "auto":
            return Precision(str(dtype).removeprefix("torch."), dtype)
        case "int8":
            from torchao.quantization import Int8WeightOnlyConfig

            # A scale a row and activations as they are: the same sums on every device, whatever else is in the batch.
            return Precision(asked, dtype, TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=_UNQUANTISED))
        case "int4":
            _import_bitsandbytes_as_installed()
            # NF4, 64 weights a scale: of the 4-bit forms that transformers loads, the one a CPU and a GPU both have.
            nf4 = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=dtype,
                llm_int8_skip_modules=_UNQUANTISED,
            )
            return Precision(asked, dtype, nf4)
        case _:
            return Precision(asked, getattr(torch, asked))


def _native_dtype(device: torch.device) -> torch.dtype:
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def _import_bitsandbytes_as_installed() -> None:
    """It downloads code and runs it, as it is imported, where the package `kernels` lets it. Here it cannot."""
    hidden = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # type: ignore[assignment]
    # It would advise to install that very package.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        importlib.import_module("bitsandbytes")
    finally:
        del sys.modules["kernels"]
        if hidden is not None:
            sys.modules["kernels"] = hidden


def _require(package: str, precision: str) -> None:
    if find_spec(package) is None:
        raise PrecisionUnavailable(
            f"KEYE_PRECISION={precision} needs {package}, which is not installed. "
            f"Install it: {install_command('quantised')}"
        )
