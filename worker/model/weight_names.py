"""Every tensor a Keye-VL checkpoint holds: name and shape from `config.json` alone.

The model on the meta device would know them too, but who checks a folder before a worker starts must not load torch; a
test holds the two equal.
"""

from collections.abc import Mapping
from typing import Any

from keye.worker.model.variant import VARIANTS

# Leftovers of the encoder the tower was made from; in every released checkpoint, read by nobody.
UNUSED_TENSORS = r"^visual\.vision_model\.(head\.|embeddings\.packing_position_embedding\.)"

Shapes = dict[str, tuple[int, ...]]


def tensor_shapes(config: Mapping[str, Any]) -> Shapes:
    """Name to shape of all tensors the model reads, for the parsed `config.json` of either variant.

    Fields that are left out of files saved again have the values of `configuration_keye.py`.
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
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config.get("head_dim", 128)
    queries, keys = config["num_attention_heads"] * head, config.get("num_key_value_heads", 8) * head
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
