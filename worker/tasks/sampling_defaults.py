"""How the checkpoint samples where a job does not say. Samples nothing."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from keye.config.job import GenerationOptions
from keye.worker.engine.inbox import SamplingOptions


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float

    @classmethod
    def from_checkpoint(cls, folder: Path) -> Self:
        """What `generation_config.json` says; what it leaves out is off."""
        written = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
        return cls(
            temperature=written.get("temperature", 1.0) if written.get("do_sample") else 0.0,
            top_p=written.get("top_p", 1.0),
            top_k=written.get("top_k", 0),
            repetition_penalty=written.get("repetition_penalty", 1.0),
        )

    def complete(self, options: GenerationOptions) -> SamplingOptions:
        """The job's options, each one left out taken from the checkpoint."""
        return SamplingOptions(**(asdict(self) | options.model_dump(exclude_none=True)))
