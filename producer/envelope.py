"""From a job to what is stored and published. Pure: no clock but the seal's, no I/O."""

import hashlib
import json
from dataclasses import dataclass

from keye.config.job import AnalysisJob
from keye.config.topology import message
from keye.config.wire import SealedJob, seal


@dataclass(frozen=True, slots=True)
class Envelope:
    """One submission: `fingerprint` tells whether two jobs ask for the same thing."""

    sealed: SealedJob
    fingerprint: str

    @property
    def job_id(self) -> str:
        return self.sealed.job_id

    @property
    def message(self) -> str:
        """What lies in the queue."""
        return message(self.job_id, self.sealed.model_dump(mode="json"), self.sealed.job.priority)


def enclose(job: AnalysisJob) -> Envelope:
    """Seal a job under a new id, ready to be submitted. Raises `InvalidJob` where it cannot be sent."""
    sealed = seal(job)
    canonical = json.dumps(job.model_dump(mode="json"), sort_keys=True)
    return Envelope(sealed, hashlib.sha256(canonical.encode()).hexdigest())
