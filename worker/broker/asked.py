"""What a message asks beside its job."""

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from keye.config.contract import Report
from keye.worker.broker.canvas import Canvas
from keye.worker.broker.envelope import MAX_REASON_CHARS


class Asked(Report):
    """Times are Unix seconds of the caller's clock. `refused` says why the job is to be ended unseen."""

    refused: Annotated[str, Field(max_length=2 * MAX_REASON_CHARS)] | None = None
    not_before: float | None = None
    expires_at: float | None = None
    canvas: Canvas | None = None

    def written_into(self, record: Mapping[str, str]) -> dict[str, str]:
        """The fields of a new job's record with these in it."""
        written = dict(record)
        if self.not_before is not None:
            written["due_at"] = repr(self.not_before)
        if self.expires_at is not None:
            written["deadline_at"] = repr(min(self.expires_at, float(written["deadline_at"] or "inf")))
        if self.canvas is not None:
            written["canvas"] = self.canvas.model_dump_json(exclude_none=True)
        return written


NOTHING_ASKED = Asked()
