"""Trains the small Keye's tokenizer on what is said about scenes and writes the official tokenizer files."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from keye.worker.demo.questions import CHINESE, Question, Thinking
from keye.worker.demo.scenes import IMAGE_SIZE, draw_image_scene, draw_images, draw_video_scene

ADDED_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>",
    "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>",
    "<think>", "</think>", "<|point_start|>", "<|point_end|>", "<|ocr_text_start|>", "<|ocr_text_end|>",
    "<|clip_time_start|>", "<|clip_time_end|>",
)  # fmt: skip
"""In the official order; all of these, and no others, are single tokens whatever the training text was."""

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
"""Those that decoding leaves out; `<think>` stays."""

SUFFIXES: dict[Thinking, str] = {"auto": "", "think": "/think", "no_think": "/no_think"}

# The word pattern of the Qwen2 tokenizer: every digit is a word of its own.
_WORD = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_MAX_ENTRIES = 1024
_NUM_SCENES = 400
# That pattern takes a whole Chinese sentence, and a tag's ">" with the word behind it, for one word. Cut here, no
# merge crosses these places, so "红色" is one token and the same one wherever it stands.
_CUT = re.compile("(" + "|".join([*CHINESE.values(), "一个", "两个", "三个", ">"]) + ")")


def train_tokenizer() -> Tokenizer:
    """A byte-level BPE over the demo's words: any text is encoded, these words in one token each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORD), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_MAX_ENTRIES,
        min_frequency=3,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_pieces(), trainer)
    tokenizer.add_tokens([AddedToken(t, special=t in SPECIAL_TOKENS, normalized=False) for t in ADDED_TOKENS])
    return tokenizer


def write_tokenizer(folder: Path, tokenizer: Tokenizer, max_length: int) -> None:
    """Writes `tokenizer.json` and the five older files that official checkpoints carry beside it."""
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))
    added = {token: tokenizer.token_to_id(token) for token in ADDED_TOKENS}
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    additional = [token for token in SPECIAL_TOKENS if token != "<|endoftext|>"]
    files = {
        "added_tokens.json": added,
        "special_tokens_map.json": {
            "additional_special_tokens": additional,
            "eos_token": {"content": "<|im_end|>", **plain},
            "pad_token": {"content": "<|endoftext|>", **plain},
        },
        "tokenizer_config.json": {
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": {
                str(i): {"content": token, **plain, "special": token in SPECIAL_TOKENS} for token, i in added.items()
            },
            "additional_special_tokens": additional,
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "model_max_length": max_length,
            "pad_token": "<|endoftext|>",
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _pieces() -> Iterator[str]:
    rng = np.random.default_rng((0, 0))
    for _ in range(_NUM_SCENES):
        scenes = draw_image_scene(rng).questions, draw_video_scene(rng).questions, draw_images(rng, [IMAGE_SIZE] * 3)[1]
        for question in (question for questions in scenes for question in questions):
            yield from _words_of(question)


def _words_of(question: Question) -> Iterator[str]:
    text = ["user\n", "assistant\n", "system\n", *(question.text + suffix for suffix in SUFFIXES.values())]
    text += [question.reply(thinking) for thinking in SUFFIXES]
    for line in text:
        for token in ("<think>", "</think>"):
            line = line.replace(token, ">")
        yield from _CUT.split(line)
