"""What a quantised load takes of memory meanwhile, against what the model keeps. In a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.real_size import make_checkpoint
from keye.config.codes import PrecisionSetting
from keye.worker.model.configuration_keye import KeyeConfig, KeyeVisionConfig
from keye.worker.model.precision import WEIGHT_SHARE

ROOT = Path(__file__).parents[2]

LOAD = """
import json, sys, threading
from pathlib import Path
import torch
from keye.worker.model.load import load_model
from keye.worker.model.precision import choose_precision

def anonymous_bytes():
    return 1024 * int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])

def watch():
    while True:
        sizes.append(anonymous_bytes())
        watches.set()
        if is_over.wait(0.002):
            return

torch.set_num_threads(1)
small, folder, precision = sys.argv[1:]
chosen = choose_precision(precision, torch.device("cpu"))
load_model(small, dtype=chosen.dtype, quantization=chosen.quantization)  # what libraries load when first asked
before, sizes, watches, is_over = anonymous_bytes(), [], threading.Event(), threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
watches.wait()
model = load_model(folder, dtype=chosen.dtype, quantization=chosen.quantization)
is_over.set()
watcher.join()
print(json.dumps({"peak": max(sizes) - before, "then": anonymous_bytes() - before}))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """95 M weights, nearly all of them in the decoder's 24 layers: each tensor is small beside the whole."""
    vision = KeyeVisionConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2)
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 4, "num_hidden_layers": 24}
    folder = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint(folder, KeyeConfig(vocab_size=512, vision_config=vision, **sizes))
    return folder


@pytest.mark.holds("docs/model.md#precision", "Loading takes no more memory than the model then keeps")
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantised_loading_never_takes_much_more_memory_than_the_model_keeps(
    precision: PrecisionSetting, checkpoint: Path
) -> None:
    small = ROOT / "worker" / "demo" / "checkpoint"
    command = [sys.executable, "-c", LOAD, str(small), str(checkpoint), precision]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    memory = json.loads(run.stdout)
    num_file_bytes = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    assert memory["then"] < WEIGHT_SHARE[precision] * num_file_bytes
    assert memory["peak"] < 1.2 * memory["then"]
