"""A checkpoint folder without its weights: is it whole, which tensors it holds, what it writes conversations with.

No torch: a worker's parent process asks too, and it must not load it. Of the weights only the headers are read.
"""

import json
import operator
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from keye.worker.model.checkpoint_files import (
    HEAD_DIM,
    INDEX_BYTES,
    KEY_VALUE_HEADS,
    VARIANTS,
    AnotherArchitecture,
    check_size,
    read_config,
    read_generation,
    read_object,
    read_preprocessor,
    read_text,
)

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
IMAGE_PAD = "<|image_pad|>"

# Leftovers of the encoder the tower was made from; in every released checkpoint, read by nobody.
UNUSED_TENSORS = r"^visual\.vision_model\.(head\.|embeddings\.packing_position_embedding\.)"

# Of the released ones they are of 11 MB and of 100 kB.
MAX_VOCABULARY_BYTES, MAX_HEADER_BYTES = 100 * 2**20, 16 * 2**20

MOST_TOLD = 20

Shapes = dict[str, tuple[int, ...]]


def check_checkpoint(path: Path | str) -> list[str]:
    """Everything wrong with the folder, one sentence each; empty when a worker can load it."""
    folder = Path(path)
    if not folder.is_dir():
        cure = "Point to a folder that holds config.json and the weights."
        # As scripts name a model that a library is to download.
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)):
            cure = f"Nothing is downloaded: hf download {folder} --local-dir {folder.name}, and give that folder."
        return [f"{folder} is not a directory here. {cure}"]
    faults = []
    config: dict[str, Any] = {}
    try:
        config = read_config(folder)
    except AnotherArchitecture as error:
        return [str(error)]
    except ValueError as error:
        faults.append(str(error))
    tensors, weight_faults = _read_headers(folder)
    for read in (read_preprocessor, read_generation, _check_tokenizer, load_chat_template):
        try:
            read(folder)
        except ValueError as error:
            faults.append(str(error))
    faults += weight_faults
    if config and not weight_faults:
        faults += _compare(config, tensors)
    # Two may have read the same file.
    return list(dict.fromkeys(faults))


def in_short(faults: Sequence[str]) -> str:
    """The first of them; a folder may have a thousand."""
    rest = [f"and {len(faults) - MOST_TOLD} more"] if len(faults) > MOST_TOLD else []
    return "; ".join([*faults[:MOST_TOLD], *rest])


def _check_tokenizer(folder: Path) -> None:
    read_object(folder / "tokenizer_config.json")
    vocabularies = [folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt")]
    if not any(file.is_file() for file in vocabularies[:2]):
        raise ValueError(f"no tokenizer.json and no vocab.json with merges.txt in {folder}")
    for file in vocabularies:
        if file.exists():
            check_size(file, MAX_VOCABULARY_BYTES)


def load_chat_template(path: Path | str) -> str:
    """The first template of the folder that can write an image; a tokenizer's own is often the text model's.

    Raises `ValueError` when there is none.
    """
    folder = Path(path)
    for name in ("chat_template.json", "chat_template.jinja", "tokenizer_config.json"):
        file = folder / name
        if not file.is_file():
            continue
        template = read_text(file) if file.suffix == ".jinja" else read_object(file).get("chat_template")
        if isinstance(template, str) and IMAGE_PAD in template:
            return template
    raise ValueError(
        f"no chat template in {folder} writes {IMAGE_PAD}; chat_template.json is missing or the text model's"
    )


def _compare(config: dict[str, Any], tensors: Shapes) -> list[str]:
    expected = tensor_shapes(config)
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


def _read_headers(folder: Path) -> tuple[Shapes, list[str]]:
    """Shapes by tensor name from the safetensors headers, and what is wrong with the files."""
    faults: list[str] = []
    if (folder / INDEX_FILE).is_file():
        try:
            listed = read_object(folder / INDEX_FILE, INDEX_BYTES).get("weight_map")
        except ValueError as error:
            return {}, [str(error)]
        if not isinstance(listed, dict) or not all(map(_is_file_name, listed.values())):
            return {}, [f"{INDEX_FILE} in {folder} has no weight_map of tensors and the names of their files"]
        shards: list[str] = sorted(set(listed.values()))
    elif (folder / SINGLE_FILE).is_file():
        shards = [SINGLE_FILE]
    else:
        return {}, [f"no {SINGLE_FILE} and no {INDEX_FILE} in {folder}; only safetensors are read"]
    tensors: Shapes = {}
    for number, shard in enumerate(shards, start=1):
        if not (folder / shard).is_file():
            faults.append(f"weight shard {number} of {len(shards)}, {shard}, is missing")
            continue
        try:
            tensors |= _read_header(folder / shard)
        except ValueError as error:
            faults.append(f"weight shard {number} of {len(shards)}, {shard}: {error}")
    return tensors, faults


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and Path(name).name == name


def _read_header(file: Path) -> Shapes:
    """A safetensors file starts with the length of a JSON header (8 bytes, little endian), then the header."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if 8 + length > size:
            raise ValueError(f"not a safetensors file, or cut off inside its header at {size} bytes")
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"its header has {length:,} bytes, the limit is {MAX_HEADER_BYTES:,}")
        text = stream.read(length)
    try:
        header: dict[str, Any] = json.loads(text)
        header.pop("__metadata__", None)
        needed = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        shapes = {name: tuple(map(operator.index, entry["shape"])) for name, entry in header.items()}
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a safetensors file: its header names no tensors ({type(error).__name__})") from None
    if size < needed:
        raise ValueError(f"cut off at {size} of {needed} bytes; fetch it again")
    return shapes


def tensor_shapes(config: Mapping[str, Any]) -> Shapes:
    """Name to shape of all tensors the model reads, for the parsed `config.json` of either variant.

    The model on the meta device would know them too, but not without torch; a test holds the two equal. Fields that
    are left out of files saved again have the values of `configuration_keye.py`.
    """
    shapes = _text_shapes(config) | _vision_shapes(config["vision_config"]) | _projector_shapes(config)
    if config.get("tie_word_embeddings", False):
        del shapes["lm_head.weight"]
    return shapes


def _linear(name: str, width_out: int, width_in: int, bias: bool = True) -> Shapes:
    weight: Shapes = {f"{name}.weight": (width_out, width_in)}
    return weight | {f"{name}.bias": (width_out,)} if bias else weight


def _layer_norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _text_shapes(config: Mapping[str, Any]) -> Shapes:
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config.get("head_dim", HEAD_DIM)
    queries, keys = config["num_attention_heads"] * head, config.get("num_key_value_heads", KEY_VALUE_HEADS) * head
    has_bias = config.get("attention_bias", False)
    shapes: Shapes = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "lm_head.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        shapes |= _linear(f"{layer}.self_attn.q_proj", queries, hidden, has_bias)
        shapes |= _linear(f"{layer}.self_attn.k_proj", keys, hidden, has_bias)
        shapes |= _linear(f"{layer}.self_attn.v_proj", keys, hidden, has_bias)
        shapes |= _linear(f"{layer}.self_attn.o_proj", hidden, queries, has_bias)
        shapes |= _linear(f"{layer}.mlp.gate_proj", inner, hidden, bias=False)
        shapes |= _linear(f"{layer}.mlp.up_proj", inner, hidden, bias=False)
        shapes |= _linear(f"{layer}.mlp.down_proj", hidden, inner, bias=False)
        shapes |= {f"{layer}.self_attn.{norm}.weight": (head,) for norm in ("q_norm", "k_norm")}
        shapes |= {f"{layer}.{norm}.weight": (hidden,) for norm in ("input_layernorm", "post_attention_layernorm")}
    return shapes


def _vision_shapes(vision: Mapping[str, Any]) -> Shapes:
    hidden, inner, patch = vision["hidden_size"], vision["intermediate_size"], vision.get("patch_size", 14)
    tower = "visual.vision_model"
    shapes: Shapes = {
        f"{tower}.embeddings.patch_embedding.weight": (hidden, vision.get("num_channels", 3), patch, patch),
        f"{tower}.embeddings.patch_embedding.bias": (hidden,),
        f"{tower}.embeddings.position_embedding.weight": ((vision["image_size"] // patch) ** 2, hidden),
    }
    for index in range(vision["num_hidden_layers"]):
        layer = f"{tower}.encoder.layers.{index}"
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{layer}.self_attn.{projection}", hidden, hidden)
        shapes |= _linear(f"{layer}.mlp.fc1", inner, hidden) | _linear(f"{layer}.mlp.fc2", hidden, inner)
        shapes |= _layer_norm(f"{layer}.layer_norm1", hidden) | _layer_norm(f"{layer}.layer_norm2", hidden)
    return shapes | _layer_norm(f"{tower}.post_layernorm", hidden)


def _projector_shapes(config: Mapping[str, Any]) -> Shapes:
    vision = config["vision_config"]
    merged = vision["hidden_size"] * vision.get("spatial_merge_size", 2) ** 2
    normalised = merged if VARIANTS[config["model_type"]].normalises_merged_patches else vision["hidden_size"]
    return (
        _layer_norm("mlp_AR.pre_norm", normalised)
        | _linear("mlp_AR.linear_1", merged, merged)
        | _linear("mlp_AR.linear_2", config["hidden_size"], merged)
    )
