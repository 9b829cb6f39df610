"""From whatever was raised under a job to the code and the sentence its caller reads."""

from keye.config.job import AnalysisJob
from keye.config.outcome import ErrorCode, JobFailure, PartialText, Stage
from keye.config.wire import JobOutline
from keye.worker.engine.inbox import GenerationFault, TooLongForEngine
from keye.worker.leases.job_lease import Claimed
from keye.worker.media.job_media import MediaFault
from keye.worker.model.image_processing import UnusableImage
from keye.worker.results.outcome_size import OutcomeTooLarge

CANCELLED_WHILE_RUNNING = "The caller cancelled the job while it ran."
CANCELLED_BEFORE = "The caller cancelled the job before it ran."
ANOTHERS_ID = "The message's job_id is that of another job. Give each job an id of its own, the task's is best."


class JobFault(Exception):
    """The job cannot be answered, and it is known why.

    `partial` is what was written of an answer, `retry_after_seconds` what the other side asked to be left alone for.
    """

    def __init__(
        self,
        code: ErrorCode,
        message: str,
        media_index: int | None = None,
        partial: PartialText | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.media_index = media_index
        self.partial = partial
        self.retry_after_seconds = retry_after_seconds


def explain(error: BaseException) -> JobFault:
    """Never the text of an unexpected error: it may hold what only the operator should read, and the log has it."""
    match error:
        case JobFault():
            return error
        case MediaFault():
            return JobFault(error.code, error.message, error.media_index, retry_after_seconds=error.retry_after_seconds)
        case GenerationFault():
            return JobFault(error.code, error.message)
        case TooLongForEngine():
            return JobFault(ErrorCode.PROMPT_TOO_LONG, str(error))
        case OutcomeTooLarge():
            return JobFault(error.code, str(error))
        case UnusableImage():
            return JobFault(ErrorCode.MEDIA_UNSUPPORTED, str(error))
        case _:
            return JobFault(
                ErrorCode.INTERNAL,
                f"The worker failed with {type(error).__name__}. Its log has the traceback beside this job's id.",
            )


def failure_of(fault: JobFault, stage: Stage, lease: Claimed, job: AnalysisJob | JobOutline | None) -> JobFailure:
    """The outcome that tells the caller; `job` is None where it could not be read."""
    return JobFailure(
        job_id=lease.job_id,
        code=fault.code,
        message=fault.message,
        stage=stage,
        retryable=fault.code.facts.retryable,
        attempts=lease.attempt,
        media_index=fault.media_index,
        partial=fault.partial,
        metadata={} if job is None else job.metadata,
    )
