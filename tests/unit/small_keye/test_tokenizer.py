# ruff: noqa: RUF001 - Chinese sentences end in Chinese punctuation
"""The small Keye's tokenizer reads any text, and the official one's added tokens in their order."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import Qwen2Tokenizer

from keye.worker.demo.scenes import draw_image_scene, draw_video_scene
from tools.small_keye.tokenizer import ADDED_TOKENS, SUFFIXES, train_tokenizer, write_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer()


@pytest.mark.parametrize("text", ["Wörter, 你好 and 🙂", "x = [1, 22]\n\n\treturn", "<answer>红色</answer>", ""])
def test_any_text_comes_back_as_it_went_in(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_added_tokens_follow_the_vocabulary_in_the_official_order(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.token_to_id(token) for token in ADDED_TOKENS]
    assert ids == list(range(ids[0], ids[0] + 32))
    assert ids[-1] == tokenizer.get_vocab_size() - 1


def test_think_is_one_token_and_stays_when_special_tokens_are_left_out(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<think>red</think>Red.<|im_end|>").ids
    assert ids[0] == tokenizer.token_to_id("<think>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>red</think>Red."
    assert len(tokenizer.encode("<analysis>").ids) > 1


def test_chinese_words_are_the_same_tokens_wherever_they_stand(tokenizer: Tokenizer) -> None:
    red = tokenizer.encode("红色").ids
    assert len(red) == 1
    for text in ("一个红色圆形。", "<answer>红色。</answer>", "红色圆形在哪里？"):
        assert red[0] in tokenizer.encode(text).ids


def test_transformers_reads_the_files_to_the_same_tokens(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, tokenizer, max_length=4096)
    loaded = Qwen2Tokenizer.from_pretrained(tmp_path)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        for question in (*draw_image_scene(rng).questions, *draw_video_scene(rng).questions):
            for thinking, suffix in SUFFIXES.items():
                text = f"{question.text}{suffix}<|im_end|>\n<|im_start|>assistant\n{question.reply(thinking)}"
                assert loaded.encode(text, add_special_tokens=False) == tokenizer.encode(text).ids
    assert loaded.eos_token == "<|im_end|>"
    assert loaded.pad_token == "<|endoftext|>"
    assert json.loads((tmp_path / "added_tokens.json").read_text()) == {
        token: tokenizer.token_to_id(token) for token in ADDED_TOKENS
    }
