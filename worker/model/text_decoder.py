"""The text decoder: embeddings and three-row positions to hidden states. Which attention runs is the config's word."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.activations import ACT2FN
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

from worker.model.configuration_keye import KeyeConfig
from worker.model.rotary import rotate, text_rotation


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention as it is written on paper, for comparison with the kernels. [B, heads, L, d] to [B, L, heads, d]."""
    key, value = (repeat_kv(x, query.shape[1] // x.shape[1]) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


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

    def forward(
        self,
        hidden: Tensor,
        rotation: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **attention_kwargs: Any,
    ) -> Tensor:
        heads = (-1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden).unflatten(-1, heads))
        key = self.k_norm(self.k_proj(hidden).unflatten(-1, heads))
        value = self.v_proj(hidden).unflatten(-1, heads).transpose(1, 2)
        # Turned together: a rotation is several kernels, each far smaller than a launch when one token is decoded.
        turned = rotate(torch.cat((query, key), dim=2), *rotation).transpose(1, 2)
        query, key = turned.split((query.shape[2], key.shape[2]), dim=1)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        output, _ = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **attention_kwargs,
        )
        return self.o_proj(output.flatten(-2))


class KeyeMLP(nn.Module):
    def __init__(self, config: KeyeConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(hidden)) * self.up_proj(hidden))


class KeyeDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: KeyeConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = KeyeAttention(config, layer_idx)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = KeyeMLP(config)

    def forward(self, hidden: Tensor, rotation: tuple[Tensor, Tensor], **attention_kwargs: Any) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), rotation, **attention_kwargs)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class KeyePreTrainedModel(PreTrainedModel):
    config: KeyeConfig
    config_class = KeyeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["KeyeDecoderLayer", "VisionEncoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = True


class KeyeTextModel(KeyePreTrainedModel):
    def __init__(self, config: KeyeConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(KeyeDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **attention_kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states [B, L, H] after the final norm, for embeddings [B, L, H] at positions [3, B, L].

        What else is given goes to the attention function as it is, so a paged attention gets its block table here.
        """
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
        )
        rope = self.config.rope_parameters
        cos, sin = text_rotation(
            position_ids, self.config.head_dim, rope["rope_theta"], rope["mrope_section"], inputs_embeds.dtype
        )
        rotation = (cos.unsqueeze(2), sin.unsqueeze(2))
        hidden = inputs_embeds
        for layer in self.layers:
            hidden = layer(
                hidden, rotation, attention_mask=causal_mask, past_key_values=past_key_values, **attention_kwargs
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), past_key_values=past_key_values)
