"""What became of the attempts at a job before its last: one entry each, in the job's record."""

from keye.config.contract import Report
from keye.config.error_codes import ErrorCode
from keye.config.event import Stage


class FailedAttempt(Report):
    """An attempt that did not answer the job. Times are Unix seconds of the server's clock; `worker` is host:pid."""

    attempt: int
    worker: str
    began_at: float
    ended_at: float
    stage: Stage
    code: ErrorCode
    message: str
