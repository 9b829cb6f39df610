"""From a job to what is stored and published. Pure: no clock but the seal's, no I/O."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from config.job import AnalysisJob
from config.topology import PRIORITY_STEPS
from config.wire import SealedJob, seal


@dataclass(frozen=True, slots=True)
class Envelope:
    """One submission: `fingerprint` tells whether two jobs ask for the same thing."""

    sealed: SealedJob
    fingerprint: str

    @property
    def job_id(self) -> str:
        return self.sealed.job_id

    @property
    def message(self) -> dict[str, Any]:
        """The keyword arguments of the Celery task."""
        return {"sealed": self.sealed.model_dump(mode="json")}

    @property
    def priority_step(self) -> int:
        return PRIORITY_STEPS[self.sealed.job.priority]


def enclose(job: AnalysisJob) -> Envelope:
    """Seal a job under a new id, ready to be submitted."""
    canonical = json.dumps(job.model_dump(mode="json"), sort_keys=True)
    return Envelope(sealed=seal(job), fingerprint=hashlib.sha256(canonical.encode()).hexdigest())
