"""A checkpoint folder without its weights: is it whole, and what does it write conversations with.

No torch: a worker's parent process asks too, and it must not load it. Of the weights only the headers are read.
"""

import json
import re
import struct
from pathlib import Path
from typing import Any

from keye.worker.model.variant import VARIANTS
from keye.worker.model.weight_names import UNUSED_TENSORS, tensor_shapes

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
IMAGE_PAD = "<|image_pad|>"


def check_checkpoint(path: Path | str) -> list[str]:
    """Everything wrong with the folder, one sentence each; empty when a worker can load it."""
    folder = Path(path)
    if not folder.is_dir():
        return [f"{folder} is not a directory. Point to a folder that holds config.json and the weights."]
    faults = [
        f"{name} is missing in {folder}"
        for name in ("config.json", "preprocessor_config.json", "generation_config.json", "tokenizer_config.json")
        if not (folder / name).is_file()
    ]
    if not (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file():
        faults.append(f"no tokenizer.json and no vocab.json with merges.txt in {folder}")
    try:
        load_chat_template(folder)
    except ValueError as error:
        faults.append(str(error))
    tensors, weight_faults = _read_headers(folder)
    faults += weight_faults
    if (folder / "config.json").is_file():
        try:
            faults += _compare(_read_json(folder / "config.json"), tensors if not weight_faults else None)
        except (ValueError, KeyError, TypeError) as error:
            faults.append(f"config.json in {folder} cannot be read as a Keye-VL config: {error!r}")
    return faults


def load_chat_template(path: Path | str) -> str:
    """The first template of the folder that can write an image; a tokenizer's own is often the text model's.

    Raises `ValueError` when there is none.
    """
    folder = Path(path)
    for name in ("chat_template.json", "chat_template.jinja", "tokenizer_config.json"):
        file = folder / name
        if not file.is_file():
            continue
        text = file.read_text(encoding="utf-8")
        template = text if file.suffix == ".jinja" else json.loads(text).get("chat_template")
        if isinstance(template, str) and IMAGE_PAD in template:
            return template
    raise ValueError(
        f"no chat template in {folder} writes {IMAGE_PAD}; chat_template.json is missing or the text model's"
    )


def _compare(config: dict[str, Any], tensors: dict[str, tuple[int, ...]] | None) -> list[str]:
    if (model_type := config.get("model_type")) not in VARIANTS:
        return [f"config.json names the model type {model_type!r}, a worker runs {' or '.join(VARIANTS)}"]
    expected = tensor_shapes(config)
    if tensors is None:
        return []
    faults = []
    for name, shape in expected.items():
        if name not in tensors:
            faults.append(f"tensor {name} {list(shape)} is missing")
        elif tensors[name] != shape:
            faults.append(f"tensor {name} has the shape {list(tensors[name])}, config.json asks for {list(shape)}")
    tied = {"lm_head.weight"} if config.get("tie_word_embeddings", False) else set()
    for name in tensors.keys() - expected.keys() - tied:
        if not re.match(UNUSED_TENSORS, name):
            faults.append(f"tensor {name} {list(tensors[name])} is in the files but not in the model")
    return faults


def _read_headers(folder: Path) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Shapes by tensor name from the safetensors headers, and what is wrong with the files."""
    faults: list[str] = []
    if (folder / INDEX_FILE).is_file():
        try:
            listed: dict[str, str] = _read_json(folder / INDEX_FILE)["weight_map"]
        except (ValueError, KeyError) as error:
            return {}, [f"{INDEX_FILE} cannot be read: {error!r}"]
        shards = sorted(set(listed.values()))
    elif (folder / SINGLE_FILE).is_file():
        listed, shards = {}, [SINGLE_FILE]
    else:
        return {}, [f"no {SINGLE_FILE} and no {INDEX_FILE} in {folder}; only safetensors are read"]
    tensors: dict[str, tuple[int, ...]] = {}
    for number, shard in enumerate(shards, start=1):
        if not (folder / shard).is_file():
            faults.append(f"weight shard {number} of {len(shards)}, {shard}, is missing")
            continue
        try:
            tensors |= _read_header(folder / shard)
        except ValueError as error:
            faults.append(f"weight shard {number} of {len(shards)}, {shard}: {error}")
    return tensors, faults


def _read_header(file: Path) -> dict[str, tuple[int, ...]]:
    """A safetensors file starts with the length of a JSON header (8 bytes, little endian), then the header."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if 8 + length > size:
            raise ValueError(f"not a safetensors file, or cut off inside its header at {size} bytes")
        header: dict[str, Any] = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    needed = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size < needed:
        raise ValueError(f"cut off at {size} of {needed} bytes; fetch it again")
    return {name: tuple(entry["shape"]) for name, entry in header.items()}


def _read_json(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content
