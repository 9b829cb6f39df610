"""The text decoder: embeddings and three-row positions to hidden states. Who attends to whom is its caller's word."""

from typing import Protocol

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_utils import PreTrainedModel

from keye.worker.model.configuration_keye import KeyeConfig
from keye.worker.model.rotary import rotate, text_rotation


class Attend(Protocol):
    """How one layer's heads see each other: the caller's matter, who knows what is padded, cached or paged."""

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Queries [B, heads, L, d], keys and values [B, kv_heads, L, d] of the new tokens to [B, L, heads, d]."""


class KeyeAttention(nn.Module):
    """Causal grouped-query attention with a norm on each query and key head before the rotation."""

    is_causal = True

    def __init__(self, config: KeyeConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        query_width = config.num_attention_heads * config.head_dim
        key_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=config.attention_bias)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps)

    def forward(self, hidden: Tensor, rotation: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        heads = (-1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden).unflatten(-1, heads))
        key = self.k_norm(self.k_proj(hidden).unflatten(-1, heads))
        value = self.v_proj(hidden).unflatten(-1, heads).transpose(1, 2)
        # Turned together: a rotation is several kernels, each far smaller than a launch when one token is decoded.
        turned = rotate(torch.cat((query, key), dim=2), *rotation).transpose(1, 2)
        query, key = turned.split((query.shape[2], key.shape[2]), dim=1)
        return self.o_proj(attend(self.layer_idx, query, key, value, self.scaling).flatten(-2))


class KeyeMLP(nn.Module):
    def __init__(self, config: KeyeConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(hidden)) * self.up_proj(hidden))


class KeyeDecoderLayer(nn.Module):
    def __init__(self, config: KeyeConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = KeyeAttention(config, layer_idx)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = KeyeMLP(config)

    def forward(self, hidden: Tensor, rotation: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), rotation, attend)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class KeyePreTrainedModel(PreTrainedModel):
    config: KeyeConfig
    config_class = KeyeConfig
    base_model_prefix = "model"
    _no_split_modules = ["KeyeDecoderLayer", "VisionEncoderLayer"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = True


class KeyeTextModel(KeyePreTrainedModel):
    def __init__(self, config: KeyeConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(KeyeDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_init()

    def forward(self, inputs_embeds: Tensor, position_ids: Tensor, attend: Attend) -> Tensor:
        """Hidden states [B, L, H] after the final norm, for embeddings [B, L, H] at positions [3, B, L]."""
        rotation = text_rotation(position_ids, self.config, inputs_embeds.dtype)
        hidden = inputs_embeds
        for layer in self.layers:
            hidden = layer(hidden, rotation, attend)
        return self.norm(hidden)
