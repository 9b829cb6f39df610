"""How long an operator lets an attempt or its generation take, and what its job is told then."""

from typing import NamedTuple

from keye.config.error_codes import ErrorCode
from keye.config.event import Stage
from keye.worker.tasks.fault import JobFault


class TimeLimit(NamedTuple):
    """`seconds` from `began_at`, a time.monotonic(), as `setting` has it."""

    setting: str
    seconds: float
    began_at: float

    @property
    def ends_at(self) -> float:
        return self.began_at + self.seconds

    def fault(self, stage: Stage, now: float) -> JobFault:
        """Of an attempt that is in `stage` still."""
        return JobFault(
            ErrorCode.TIME_LIMIT_EXCEEDED,
            f"The job was stopped in stage {stage.value} after {now - self.began_at:.1f} s, the limit is "
            f"{self.seconds:g} s ({self.setting}). Ask for less (max_new_tokens, media, frames), or raise the limit.",
        )
