"""`keye-worker plan`: how many tokens a card has room for, how many jobs run there together, and what to lower."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from keye.config.codes import DeviceSetting, PrecisionSetting
from keye.worker.engine.memory import CPU_CACHE_BYTES
from keye.worker.engine.model_memory import CUDA_BYTES, ModelMemory
from keye.worker.engine.step_loop import DEFAULT_LIMITS
from keye.worker.model.device import torch_facts
from keye.worker.model.precision import WEIGHT_SHARE
from keye.worker.model.processor import KeyeProcessor

_GIB = 2**30

# So many jobs together have most of what batching gains.
ENOUGH = 8


def card_bytes(device: DeviceSetting) -> int | None:
    """The memory of the first GPU that this process sees; None where there is none, or the CPU is asked for."""
    gpus = () if device == "cpu" else torch_facts().gpus
    return gpus[0][1] if gpus else None


@dataclass(frozen=True, slots=True)
class Capacity:
    """Of a model on a card of so many bytes, `fraction` of which it may take; on the CPU where `card` is None."""

    memory: ModelMemory
    card: int | None
    fraction: float

    @classmethod
    def of(cls, path: Path, precision: PrecisionSetting, card: int | None, fraction: float) -> "Capacity":
        """Reads the checkpoint's small files, not its weights."""
        if precision == "auto":
            precision = "float32" if card is None else "bfloat16"
        return cls(ModelMemory.of(KeyeProcessor.from_checkpoint(path), precision, DEFAULT_LIMITS), card, fraction)

    @property
    def cache_bytes(self) -> int:
        """For keys and values; below zero where the card lacks so much for the model alone."""
        return CPU_CACHE_BYTES if self.card is None else self.memory.cache_bytes(int(self.fraction * self.card))

    @property
    def num_tokens(self) -> int:
        return self.memory.num_tokens(self.cache_bytes)

    @property
    def max_tokens(self) -> int:
        """What one job may have."""
        return min(self.memory.context, self.num_tokens)

    def num_jobs(self, job_tokens: int) -> int:
        """How many that come to so many tokens run to their ends together, whatever `KEYE_CONCURRENCY` is."""
        if job_tokens > self.max_tokens:
            return 0
        size = self.memory.block_size
        return min(self.num_tokens // size // -(-job_tokens // size), self.memory.max_running)

    def tokens_for(self, num_jobs: int) -> int:
        """The most that each of so many jobs may come to if all are to run together."""
        size = self.memory.block_size
        return min(self.num_tokens // size // num_jobs * size, self.max_tokens)

    def as_dict(self) -> dict[str, Any]:
        memory = self.memory
        on_gpu = {"gpu_bytes": self.card, "cuda_bytes": CUDA_BYTES, "weight_bytes": memory.weights}
        return {
            "precision": memory.precision,
            **(on_gpu | {"reserve_bytes": self.reserve_bytes} if self.card is not None else {}),
            "cache_bytes": max(self.cache_bytes, 0),
            "cache_tokens": self.num_tokens,
        }

    def in_words(self) -> str:
        """What a worker, or whoever runs an engine as it does, takes of the memory."""
        weights = f"{self.memory.weights / _GIB:.1f} GiB of weights in {self.memory.precision}"
        if self.card is None:
            return f"It takes {weights} and up to {self.cache_bytes / _GIB:.1f} GiB for keys and values, on the CPU."
        usable = self.fraction * self.card / _GIB
        return f"It takes {usable:.1f} of the GPU's {self.card / _GIB:.1f} GiB (KEYE_GPU_MEMORY_FRACTION), {weights}."

    @property
    def reserve_bytes(self) -> int:
        """For the largest step, or a video, beside weights and cache."""
        usable = int(self.fraction * (self.card or 0))
        return usable - self.memory.weights - CUDA_BYTES - self.cache_bytes


@dataclass(frozen=True, slots=True)
class JobShape:
    """How many tokens a job comes to."""

    visual: int
    text: int
    answer: int

    @property
    def num_tokens(self) -> int:
        return self.visual + self.text + self.answer


def advise(
    capacity: Capacity, shape: JobShape, concurrency: int, max_pixels_for: Callable[[int], int | None]
) -> Iterator[str]:
    """What to change, with numbers, where fewer than `concurrency` jobs of this shape run together.

    `max_pixels_for` tells with which `--max-pixels` the job's files come to so many visual tokens.
    """
    num_jobs, concurrency = capacity.num_jobs(shape.num_tokens), min(concurrency, capacity.memory.max_running)
    if num_jobs >= concurrency:
        return
    for wanted in sorted({1, concurrency}):
        tokens = capacity.tokens_for(wanted)
        if wanted <= num_jobs or tokens <= 0:
            continue
        together = f"{wanted} job{'s run together' if wanted > 1 else ' fits'} with at most {tokens:,} tokens"
        visual = tokens - shape.text - shape.answer
        if shape.visual and visual > 0:
            pixels = max_pixels_for(visual)
            lowered = f"--max-pixels {pixels}" if pixels else f"{visual:,} visual tokens"
        elif tokens > shape.visual + shape.text:
            lowered = f"--max-new-tokens {tokens - shape.visual - shape.text}"
        else:
            lowered = "a shorter question and answer"
        yield f"{together}: {lowered}"
    if capacity.card is None:
        return
    for precision in ("int8", "int4"):
        if WEIGHT_SHARE[precision] < WEIGHT_SHARE[capacity.memory.precision]:
            smaller = Capacity(capacity.memory.at(precision), capacity.card, capacity.fraction)
            if (jobs := smaller.num_jobs(shape.num_tokens)) > num_jobs:
                yield f"--precision {precision} has room for {smaller.num_tokens:,} tokens, {jobs} such jobs"
    if num_jobs == 0 and shape.num_tokens <= capacity.memory.context:
        least = capacity.memory.usable_for(shape.num_tokens) / capacity.fraction
        yield f"in {capacity.memory.precision} one such job needs a GPU of {least / _GIB:.1f} GiB"


def as_table(capacity: Capacity, shape: JobShape, concurrency: int) -> Table:
    memory, num_jobs = capacity.memory, capacity.num_jobs(shape.num_tokens)
    table = Table(show_header=False)
    if capacity.card is None:
        table.add_row("the CPU", f"{memory.precision}; the cache grows to {capacity.cache_bytes / _GIB:.1f} GiB")
    else:
        usable = capacity.fraction * capacity.card / _GIB
        table.add_row(
            "the GPU", f"{usable:.1f} of {capacity.card / _GIB:.1f} GiB may be taken (KEYE_GPU_MEMORY_FRACTION)"
        )
        weights = f"{memory.weights / _GIB:.1f} GiB in {memory.precision}, and {CUDA_BYTES / _GIB:.1f} for CUDA itself"
        table.add_row("weights", weights)
        if capacity.cache_bytes > 0:
            table.add_row("largest step or video", f"{capacity.reserve_bytes / _GIB:.1f} GiB")
            table.add_row("keys and values", f"{capacity.cache_bytes / _GIB:.1f} GiB")
        else:
            table.add_row("keys and values", f"no room: {-capacity.cache_bytes / _GIB:.1f} GiB are missing")
    table.add_row("room for", f"{capacity.num_tokens:,} tokens, of one job {capacity.max_tokens:,}")
    parts = f"{shape.visual:,} visual, {shape.text:,} of text, {shape.answer:,} of the answer"
    table.add_row("this job", f"{shape.num_tokens:,} tokens: {parts}")
    bound = f" (KEYE_CONCURRENCY); there is room for {num_jobs}" if num_jobs > concurrency else ""
    together = min(num_jobs, concurrency)
    table.add_row("together", f"{together} such job{'s' * (together != 1)}{bound}")
    return table
