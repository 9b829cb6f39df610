"""From a job to what is stored and published. Pure: no clock but the seal's, no I/O."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from config.job import AnalysisJob
from config.state import JobState
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
    def record(self) -> dict[str, str]:
        """The fields of the job's record (see `config.keys.record`) at the moment of submission."""
        job = self.sealed.job
        deadline_at = "" if job.deadline_seconds is None else repr(self.sealed.submitted_at + job.deadline_seconds)
        return {
            "state": JobState.QUEUED.value,
            "sealed": self.sealed.model_dump_json(),
            "priority": job.priority.value,
            "submitted_at": repr(self.sealed.submitted_at),
            "deadline_at": deadline_at,
            "attempts": "0",
            "max_attempts": str(job.max_attempts),
        }

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
