"""The files around the small Keye's weights, in the official layout. Holds its size in numbers; trains nothing."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tools.small_keye.tokenizer import write_tokenizer

CONTEXT_TOKENS = 4096
MIN_PIXELS = 84 * 84
# 17 tokens, so that a square becomes 112x112, 4:3 112x84 and 16:9 140x84: a photograph costs as little as a scene.
MAX_PIXELS = 17 * 28 * 28

_CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_folder(folder: Path, tokenizer: Tokenizer) -> None:
    """Writes every file of a checkpoint but `model.safetensors`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, tokenizer, CONTEXT_TOKENS)
    files = {
        "config.json": _config(tokenizer),
        "generation_config.json": {
            "bos_token_id": tokenizer.token_to_id("<|endoftext|>"),
            # Greedy, unlike the released models: the demo and the tests compare answers.
            "do_sample": False,
            "eos_token_id": [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")],
            "pad_token_id": tokenizer.token_to_id("<|endoftext|>"),
        },
        "preprocessor_config.json": {
            "min_pixels": MIN_PIXELS,
            "max_pixels": MAX_PIXELS,
            "patch_size": 14,
            "temporal_patch_size": 1,
            "merge_size": 2,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "processor_class": "KeyeProcessor",
        },
        "processor_config.json": {"processor_class": "KeyeProcessor"},
        "chat_template.json": {"chat_template": _CHAT_TEMPLATE},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _config(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "architectures": ["KeyeForConditionalGeneration"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "vision_start_token_id": tokenizer.token_to_id("<|vision_start|>"),
        "vision_end_token_id": tokenizer.token_to_id("<|vision_end|>"),
        "vision_token_id": tokenizer.token_to_id("<|vision_pad|>"),
        "image_token_id": tokenizer.token_to_id("<|image_pad|>"),
        "video_token_id": tokenizer.token_to_id("<|video_pad|>"),
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 128,
        "initializer_range": 0.02,
        "intermediate_size": 320,
        "max_position_embeddings": CONTEXT_TOKENS,
        "max_window_layers": 4,
        "model_type": "Keye",
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000,
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": -(-tokenizer.get_vocab_size() // 64) * 64,
        "vision_config": {
            "hidden_size": 96,
            "image_size": 112,
            "intermediate_size": 256,
            "model_type": "siglip_vision_model",
            "num_attention_heads": 4,
            "num_hidden_layers": 4,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
        },
    }
