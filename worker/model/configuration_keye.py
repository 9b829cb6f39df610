"""The fields of a Keye-VL `config.json`, for both released variants. No tensors live here."""

from dataclasses import field
from typing import Any, ClassVar

from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from keye.worker.model.checkpoint_files import VARIANTS, rope_parameters


class KeyeVisionConfig(PreTrainedConfig):
    """The vision tower. Absent fields take the values of the released 8B model, leftover fields are kept unread."""

    model_type = "keye_vision"
    base_config_key = "vision_config"

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 384
    patch_size: int = 14
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    spatial_merge_size: int = 2
    tokens_per_second: int | float = 2


class KeyeConfig(PreTrainedConfig):
    """Keye-VL-8B-Preview: the text model's fields at the top level beside one `vision_config`."""

    model_type = "Keye"
    sub_configs: ClassVar[dict[str, type[PreTrainedConfig]]] = {"vision_config": KeyeVisionConfig}
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache", "past_key_values"]
    ignore_keys_at_rope_validation = {"mrope_section"}  # noqa: RUF012 - the library's own way to declare it

    splits_video_into_frames, normalises_merged_patches = VARIANTS[model_type]

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 12288
    num_hidden_layers: int = 36
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    max_position_embeddings: int = 40960
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] = field(default_factory=dict)
    bos_token_id: int | None = 151643
    eos_token_id: int | list[int] | None = 151645
    pad_token_id: int | None = None
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    vision_config: KeyeVisionConfig = field(default_factory=KeyeVisionConfig)

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.vision_config, dict):
            self.vision_config = KeyeVisionConfig(**self.vision_config)
        self.rope_parameters = rope_parameters(
            self.rope_parameters or kwargs.pop("rope_scaling", None) or {},
            kwargs.pop("rope_theta", None),
            self.head_dim,
        )
        # The released files carry the keys of a sliding window that the architecture does not have; a cache built
        # from this config would believe them.
        for leftover in ("sliding_window", "use_sliding_window", "max_window_layers"):
            kwargs.pop(leftover, None)
        super().__post_init__(**kwargs)


class KeyeVL1_5Config(KeyeConfig):
    """Keye-VL-1.5-8B: each frame of a video is an item and a block of positions of its own."""

    model_type = "KeyeVL1_5"
    splits_video_into_frames, normalises_merged_patches = VARIANTS[model_type]

    max_position_embeddings: int = 131072


AutoConfig.register(KeyeConfig.model_type, KeyeConfig)
AutoConfig.register(KeyeVL1_5Config.model_type, KeyeVL1_5Config)
