"""The real worker on a checkpoint of the released 8B layout with random weights, on the CPU: how soon does it load, in
how much memory, and when has it answered?

`python -m benchmarks real_size --layers 36 --precision int8`; without options all of the layers, in each precision in
turn. The checkpoint takes 17.3 GB of disk while this runs, int8 16 GiB of memory.
"""

import json
import math
import re
import shutil
import struct
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from benchmarks.workload import image_jobs
from keye.config.job import GenerationOptions
from keye.producer import Client
from keye.worker.demo.embedded_valkey import EmbeddedValkey
from keye.worker.demo.local_worker import LocalWorker
from keye.worker.model.checkpoint import INDEX_FILE, tensor_shapes
from keye.worker.model.configuration_keye import KeyeConfig

PRECISIONS = ("bfloat16", "int8", "int4")
NUM_SHARDS = 5

_GOLDEN = Path(__file__).parents[1] / "worker" / "proof" / "preview" / "checkpoint"
_BYTES_A_WEIGHT = 2
_NUM_TEXTS = 4
_NEW_TOKENS = 8
_PATIENCE_SECONDS = 1800.0
_LOADED = re.compile(r"is loaded after ([\d.]+) s")


def make_checkpoint(folder: Path, config: KeyeConfig) -> None:
    """Files as released: five shards of random bfloat16 and their index, beside the golden checkpoint's tokenizer."""
    shutil.copytree(_GOLDEN, folder, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    # Which numbers are control tokens is the tokenizer's to say; all sizes are the config's.
    golden = json.loads((_GOLDEN / "config.json").read_text())
    tokens = {name: number for name, number in golden.items() if name.endswith("_token_id")}
    written = config.to_dict() | tokens | {"dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(written))
    # Normal values are slow to draw, and nobody asks that each be another's.
    noise = (0.02 * torch.randn(2**22, generator=torch.Generator().manual_seed(0))).bfloat16().view(torch.int16).numpy()
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    shapes = tensor_shapes(written)
    shard_size = sum(map(math.prod, shapes.values())) / NUM_SHARDS
    size = 0
    for name, shape in shapes.items():
        if size > len(shards) * shard_size:
            shards.append({})
        shards[-1][name] = shape
        size += math.prod(shape)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(shard, name)
        with (folder / name).open("wb") as file:
            _write_shard(file, shard, noise)
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _write_shard(file: BinaryIO, shard: dict[str, tuple[int, ...]], noise: np.ndarray) -> None:
    """A safetensors file tensor by tensor, so that 3.5 GB of it are never in memory."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shard.items():
        end = at + _BYTES_A_WEIGHT * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    file.write(struct.pack("<Q", len(text)) + text)
    for shape in shard.values():
        for done in range(0, size := math.prod(shape), len(noise)):
            file.write(noise[: size - done].data)


@dataclass
class Memory:
    """Of a worker's process, in bytes: what no file backs, so that the kernel can have none of it back."""

    now: int = 0
    peak: int = 0


@contextmanager
def watched_memory(worker: LocalWorker) -> Iterator[Memory]:
    """Sampled fifty times a second, from before the worker is started."""
    memory, is_over = Memory(), threading.Event()

    def sample() -> None:
        while not is_over.wait(0.02):
            try:
                supervisor = worker.process.pid
                (child,) = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
                status = Path(f"/proc/{child}/status").read_text()
                memory.now = 1024 * int(status.partition("RssAnon:")[2].split()[0])
            except (AttributeError, IndexError, OSError, ValueError):
                continue  # it has not been started yet, or has ended
            memory.peak = max(memory.peak, memory.now)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield memory
    finally:
        is_over.set()
        thread.join()


def run(num_layers: int, precisions: Sequence[str]) -> Iterator[str]:
    """Lines of Markdown, as they come; `precisions` as KEYE_PRECISION has them, one worker after another."""
    config = KeyeConfig(num_hidden_layers=num_layers)
    shapes = tensor_shapes(config.to_dict())
    num_weights = sum(map(math.prod, shapes.values()))
    yield f"Random weights of the 8B layout, {num_layers} layers: {num_weights / 1e9:.2f} B in {len(shapes)} tensors"
    yield f"and {NUM_SHARDS} shards. One image and {_NUM_TEXTS} texts at once, {_NEW_TOKENS} new tokens each.\n"
    yield "| | loaded, s | peak meanwhile, GiB | then, GiB | ratio | first token, s | all answered, s | peak, GiB |"
    yield "|---|---|---|---|---|---|---|---|"
    with tempfile.TemporaryDirectory() as name, EmbeddedValkey() as broker:
        folder = Path(name)
        make_checkpoint(folder / "checkpoint", config)
        for precision in precisions:
            yield _measure(folder, broker.url, precision)


def _measure(folder: Path, url: str, precision: str) -> str:
    settings = {
        "KEYE_MODEL_PATH": str(folder / "checkpoint"),
        "KEYE_PRECISION": precision,
        "KEYE_MEDIA_ROOTS": str(folder),
    }
    worker = LocalWorker(url, folder / f"{precision}.log", settings)
    with watched_memory(worker) as memory, worker, Client(url) as client:
        found = _LOADED.search(worker.log.read_text())
        assert found is not None, worker.log.read_text()
        loading_peak, at_rest = memory.peak, memory.now
        (about_image,) = image_jobs(folder, 1)
        short = GenerationOptions(max_new_tokens=_NEW_TOKENS, temperature=0)
        began = time.monotonic()
        submitted = [client.submit(about_image.model_copy(update={"generation": short}))]
        submitted += [client.submit(prompt=f"What is {i} and {i}?", generation=short) for i in range(_NUM_TEXTS)]
        results = [job.result(timeout=_PATIENCE_SECONDS) for job in submitted]
        seconds = time.monotonic() - began
    first = min(r.timings.queued + r.timings.total - r.timings.generate + (r.timings.first_token or 0) for r in results)
    gib = [num_bytes / 2**30 for num_bytes in (loading_peak, at_rest, memory.peak)]
    return (
        f"| {precision} | {float(found[1]):.1f} | {gib[0]:.2f} | {gib[1]:.2f} | {loading_peak / at_rest:.2f} | "
        f"{first:.1f} | {seconds:.1f} | {gib[2]:.2f} |"
    )
