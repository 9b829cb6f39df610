"""The small files of a checkpoint folder: what they hold, once it is known that a model can be built of it. No torch.

A folder may hold anything: nothing is read that is larger than it may be, and numbers have bounds far beyond any
released model's, so that none of them asks for more memory or time than there is.
"""

import json
import math
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

# Of released checkpoints these are of a few kilobytes, and the list of shards of a hundred.
SMALL_BYTES, INDEX_BYTES = 4 * 2**20, 16 * 2**20
# Where a config leaves them out.
HEAD_DIM, KEY_VALUE_HEADS = 128, 8


class Variant(NamedTuple):
    """Preview has neither: a video is one item of attention and one block of positions with a clock, and the projector
    normalises each patch. In 1.5 each frame is an item and a block of its own, and merged patches are normalised.
    """

    splits_video_into_frames: bool
    normalises_merged_patches: bool


VARIANTS = {"Keye": Variant(False, False), "KeyeVL1_5": Variant(True, True)}


class AnotherArchitecture(ValueError):
    """A model of another kind: what else the folder holds is not judged by our rules."""


# What one field has to be, in words, and whether a value is that.
Rule = tuple[str, Callable[[Any], bool]]


def check_size(file: Path, max_bytes: int) -> None:
    """Raises `ValueError`, a sentence that names the file, where it is no file of so many bytes at most."""
    if not file.exists():
        raise ValueError(f"{file.name} is missing in {file.parent}")
    if not file.is_file():
        raise ValueError(f"{file.name} in {file.parent} is no regular file")
    if (size := file.stat().st_size) > max_bytes:
        raise ValueError(f"{file.name} in {file.parent} has {size:,} bytes, the limit is {max_bytes:,}")


def read_text(file: Path, max_bytes: int = SMALL_BYTES) -> str:
    """Raises `ValueError` as `check_size` does, and where it is no text."""
    where = f"{file.name} in {file.parent}"
    check_size(file, max_bytes)
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is no text in UTF-8: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise ValueError(f"{where} cannot be read: {error.strerror}") from None


def read_object(file: Path, max_bytes: int = SMALL_BYTES) -> dict[str, Any]:
    """What its JSON says. Raises `ValueError` as `read_text` does, and where it is no object."""
    where = f"{file.name} in {file.parent}"
    text = read_text(file, max_bytes)
    try:
        held = json.loads(text)
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply to be read") from None
    except ValueError as error:
        raise ValueError(f"{where} is no JSON: {error}") from None
    if not isinstance(held, dict):
        raise ValueError(f"{where} holds {_shown(held)}, expected an object with fields")
    return held


def read_config(folder: Path) -> dict[str, Any]:
    """Of `config.json`. Raises `AnotherArchitecture`, and `ValueError` with every fault, where sizes are missing or
    beyond their bounds."""
    config = read_object(folder / "config.json")
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in VARIANTS:
        # 2.0 calls itself KeyeVL2, and KeyeVL2MoeForConditionalGeneration.
        architectures = config.get("architectures")
        names = [model_type, *(architectures if isinstance(architectures, list) else [])]
        is_keye = any("keye" in name.lower() for name in names if isinstance(name, str))
        what = "Keye-VL 2.0 or another generation: that is another architecture" if is_keye else "no Keye-VL"
        raise AnotherArchitecture(
            f"config.json in {folder} names the model type {_shown(model_type)}, which is {what}; this release runs "
            f"Preview and 1.5 of Keye-VL (model types {' and '.join(VARIANTS)})"
        )
    faults = _faults(config, _TEXT_SIZES, required=_TEXT_REQUIRED) + _faults(config, _OTHERS)
    vision = config.get("vision_config")
    if isinstance(vision, dict):
        faults += _faults(vision, _VISION_SIZES, required=_VISION_REQUIRED, within="vision_config.")
    else:
        faults.append(f"vision_config {_shown(vision)}, expected an object with fields")
    _raise_if(faults, folder / "config.json")
    try:
        saved = config.get("rope_parameters") or config.get("rope_scaling") or {}
        rope_parameters(saved, config.get("rope_theta"), config.get("head_dim", HEAD_DIM))
    except ValueError as error:
        raise ValueError(f"config.json in {folder}: {error}") from None
    return config


def rope_parameters(saved: dict[str, Any], rope_theta: float | None, head_dim: int) -> dict[str, Any]:
    """One form for what official files, files saved again by transformers 4 and by transformers 5 write differently.

    Raises `ValueError` for a rotary type the model was not trained with and for sections that do not fill the head.
    """
    rope_type = saved.get("rope_type", saved.get("type", "default"))
    if rope_type not in ("default", "mrope"):
        raise ValueError(f"rope type {_shown(rope_type)} is not one Keye-VL has: expected 'mrope' or 'default'")
    section = saved.get("mrope_section", [16, 24, 24])
    is_right = _three(_whole(1, head_dim))[1]
    if not is_right(list(section) if isinstance(section, tuple) else section) or sum(section) * 2 != head_dim:
        raise ValueError(
            f"mrope_section {_shown(section)} must be three numbers with the sum head_dim / 2 = {head_dim // 2}"
        )
    theta = saved.get("rope_theta", rope_theta)
    expected, is_right = _THETA
    if not is_right(theta):
        raise ValueError(f"rope_theta {_shown(theta)}, expected {expected}")
    return {"rope_type": "default", "rope_theta": float(theta or 1_000_000), "mrope_section": list(section)}


def read_generation(folder: Path) -> dict[str, Any]:
    """Of `generation_config.json`, without what it leaves open. Raises `ValueError` as `read_config` does."""
    written = read_object(folder / "generation_config.json")
    _raise_if(_faults(written, _SAMPLING), folder / "generation_config.json")
    return {name: value for name, value in written.items() if value is not None}


def read_preprocessor(folder: Path) -> dict[str, Any]:
    """Of `preprocessor_config.json`, likewise."""
    written = read_object(folder / "preprocessor_config.json")
    _raise_if(_faults(written, _PIXELS, required=_PIXELS_REQUIRED), folder / "preprocessor_config.json")
    return {name: value for name, value in written.items() if value is not None}


def _faults(
    held: Mapping[str, Any], rules: Mapping[str, Rule], required: frozenset[str] = frozenset(), within: str = ""
) -> list[str]:
    faults = []
    for name, (expected, is_right) in rules.items():
        if name not in held:
            if name in required:
                faults.append(f"no {within}{name}, expected {expected}")
        elif not is_right(held[name]):
            faults.append(f"{within}{name} {_shown(held[name])}, expected {expected}")
    return faults


def _raise_if(faults: list[str], file: Path) -> None:
    if faults:
        raise ValueError(f"{file.name} in {file.parent} says {'; '.join(faults)}")


def _shown(value: Any) -> str:
    return reprlib.repr(value)


def _whole(least: int, most: int) -> Rule:
    def is_right(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most

    return f"a whole number from {least} to {most}", is_right


def _number(least: float, most: float) -> Rule:
    def is_right(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most

    return f"a number from {least:g} to {most:g}", is_right


def _three(rule: Rule) -> Rule:
    return f"three of {rule[0]}", lambda value: isinstance(value, list) and len(value) == 3 and all(map(rule[1], value))


def _or_none(rule: Rule) -> Rule:
    return f"{rule[0]} or null", lambda value: value is None or rule[1](value)


def _some(rule: Rule) -> Rule:
    def is_right(value: Any) -> bool:
        return rule[1](value) or (isinstance(value, list) and all(map(rule[1], value)))

    return f"{rule[0]}, or some of them", is_right


_FLAG: Rule = ("true or false", lambda value: isinstance(value, bool))
_FIELDS: Rule = ("an object with fields", lambda value: isinstance(value, dict))
_LEAST = math.ulp(0)  # above nothing
_TOKEN = _whole(0, 2**24)
_THETA = _or_none(_number(_LEAST, 1e12))
_WIDTH, _LAYERS, _HEADS = _whole(1, 2**20), _whole(1, 1000), _whole(1, 4096)

_TEXT_SIZES: dict[str, Rule] = {
    "vocab_size": _whole(1, 2**24),
    "hidden_size": _WIDTH,
    "intermediate_size": _WIDTH,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _HEADS,
    "num_key_value_heads": _HEADS,
    "head_dim": _HEADS,
    "max_position_embeddings": _whole(1, 2**24),
}
_TEXT_REQUIRED = frozenset(_TEXT_SIZES) - {"num_key_value_heads", "head_dim", "max_position_embeddings"}
_OTHERS: dict[str, Rule] = {
    "rms_norm_eps": _number(_LEAST, 1),
    "attention_bias": _FLAG,
    "tie_word_embeddings": _FLAG,
    **dict.fromkeys(("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"), _TOKEN),
    "eos_token_id": _or_none(_some(_TOKEN)),
    "rope_theta": _THETA,
    "rope_scaling": _or_none(_FIELDS),
    "rope_parameters": _or_none(_FIELDS),
}
_VISION_SIZES: dict[str, Rule] = {
    "hidden_size": _WIDTH,
    "intermediate_size": _WIDTH,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _HEADS,
    "image_size": _whole(1, 2**16),
    "patch_size": _whole(1, 1024),
    "num_channels": _whole(1, 16),
    "spatial_merge_size": _whole(1, 64),
    "layer_norm_eps": _number(_LEAST, 1),
    "tokens_per_second": _number(_LEAST, 1e6),
}
_VISION_REQUIRED = frozenset({"hidden_size", "intermediate_size", "num_hidden_layers", "image_size"})
_SAMPLING: dict[str, Rule] = {
    "do_sample": _or_none(_FLAG),
    "temperature": _or_none(_number(0, 1e6)),
    "top_p": _or_none(_number(0, 1)),
    "top_k": _or_none(_whole(0, 2**63)),
    "repetition_penalty": _or_none(_number(0, 1e6)),
    "eos_token_id": _or_none(_some(_TOKEN)),
}
_PIXELS: dict[str, Rule] = {
    "patch_size": _whole(1, 1024),
    "merge_size": _whole(1, 64),
    "image_mean": _three(_number(-1e6, 1e6)),
    "image_std": _three(_number(1e-6, 1e6)),
    "min_pixels": _or_none(_whole(1, 2**40)),
    "max_pixels": _or_none(_whole(1, 2**40)),
    "rescale_factor": _or_none(_number(_LEAST, 1e6)),
    "resample": _or_none(_whole(0, 5)),
    "size": _or_none(_FIELDS),
}
_PIXELS_REQUIRED = frozenset({"patch_size", "merge_size", "image_mean", "image_std"})
