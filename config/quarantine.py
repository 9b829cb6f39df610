"""Messages that no worker could make anything of, as they lay in the queue, for an operator to look at."""

import json
from base64 import b64decode, b64encode
from collections.abc import Mapping
from typing import Self

from keye.config.contract import Report

# Together no more than 64 MiB, and a third more as base64.
MAX_MESSAGES = 1000
MAX_KEPT_BYTES = 64 * 1024


class QuarantinedMessage(Report):
    """`raw` is its first `MAX_KEPT_BYTES` of `size`; `job_id` the job it names, which has ended for it."""

    message_id: str
    reason: str
    worker: str
    job_id: str | None
    size: int
    raw: bytes

    @classmethod
    def of(cls, message_id: str, fields: Mapping[str, str]) -> Self:
        """An entry of the stream `keye.config.keys.QUARANTINE`; its id is the message's.

        One that no worker has put there is its own message: an operator is to see it, and those behind it.
        """
        try:
            decoded = {"message_id": message_id, "job_id": fields["job_id"] or None, "raw": b64decode(fields["raw"])}
            return cls.model_validate({**fields, **decoded})
        except (KeyError, ValueError):
            raw = json.dumps(fields).encode()
            reason = "its entry in quarantine cannot be read: a newer release wrote it, or a stranger"
            return cls(message_id=message_id, reason=reason, worker="?", job_id=None, size=len(raw), raw=raw)

    @property
    def quarantined_at(self) -> float:
        """Unix seconds of the server's clock."""
        return int(self.message_id.partition("-")[0]) / 1000


def entry_of(raw: bytes, reason: str, worker: str, job_id: str | None) -> dict[str, str]:
    """The fields of such an entry."""
    kept = b64encode(raw[:MAX_KEPT_BYTES]).decode()
    return {"reason": reason, "worker": worker, "job_id": job_id or "", "size": str(len(raw)), "raw": kept}
