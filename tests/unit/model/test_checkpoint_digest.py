"""One folder of weights is told from another."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from keye.worker.model.checkpoint_digest import digest_checkpoint
from tests.support.checkout import ROOT

SMALL = ROOT / "worker/demo/checkpoint"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SMALL, tmp_path / "elsewhere"))


def test_it_is_of_what_is_in_the_folder_and_not_of_where_it_lies(copy: Path) -> None:
    (copy / "README.md").write_text("Another's remarks.")
    assert digest_checkpoint(copy) == digest_checkpoint(SMALL)


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "chat_template.json", "tokenizer.json", "merges.txt"]
)
def test_a_letter_of_a_small_file_shows(copy: Path, name: str) -> None:
    (copy / name).write_text((copy / name).read_text().replace("e", "a", 1))
    assert digest_checkpoint(copy) != digest_checkpoint(SMALL)


def test_one_number_of_small_weights_shows(copy: Path) -> None:
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[len(weights) // 2] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert digest_checkpoint(copy) != digest_checkpoint(SMALL)


@pytest.mark.holds(
    "docs/operations.md#was-that-really-what-the-model-saw", "Of files of over 16 MiB the digest takes samples"
)
def test_any_whole_matrix_of_large_weights_shows(tmp_path: Path) -> None:
    tensors = {f"layer.{number}": np.full((2, 2**20), number, np.float16) for number in range(6)}
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    digests = {digest_checkpoint(tmp_path)}
    for name in tensors:
        save_file(tensors | {name: tensors[name] + np.float16(0.5)}, file)
        digests.add(digest_checkpoint(tmp_path))
    assert len(digests) == 1 + len(tensors)
