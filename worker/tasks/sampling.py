"""How the tokens of a job's answers are chosen: what the job says, completed by the checkpoint, and a seed each."""

import secrets
from dataclasses import replace
from pathlib import Path
from typing import Any

from keye.config.job import MAX_SEEDS, GenerationOptions
from keye.worker.engine.inbox import SamplingOptions
from keye.worker.model.checkpoint_files import read_generation

# As many whole numbers as callers' JSON surely holds (RFC 8259, 6).
_NUM_SEEDS = 2**53


def load_sampling(folder: Path) -> dict[str, Any]:
    """How the checkpoint samples where a job does not say, as `SamplingOptions` has it; what it leaves out is off."""
    written = read_generation(folder)
    sampling = {name: written[name] for name in ("top_p", "top_k", "repetition_penalty") if name in written}
    return sampling | {"temperature": written.get("temperature", 1.0) if written.get("do_sample") else 0.0}


def complete_sampling(options: GenerationOptions, defaults: dict[str, Any]) -> list[SamplingOptions]:
    """The job's options, each one left out taken from the checkpoint, once for each of its `n` samples.

    Each has a seed, so that it can be told: the one that the job gives or that is drawn, and those that follow it.
    """
    drawn = {"seed": secrets.randbelow(_NUM_SEEDS)}
    first = SamplingOptions(**(defaults | drawn | options.model_dump(exclude_none=True, exclude={"n"})))
    seed = first.seed or 0
    return [replace(first, seed=(seed + sample) % MAX_SEEDS) for sample in range(options.n)]
