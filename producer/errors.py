"""What can go wrong for a producer. A job that ran and failed is `JobFailed`, from `keye.config.outcome`.

KeyeError
├── JobNotFound          (LookupError)      no record under this id: never sent, or its outcome has expired
├── DeadLetterNotFound   (LookupError)      the job is unknown or did not fail, or its dead letter is gone
├── MessageNotFound      (LookupError)      no such message in quarantine: it never was, or it was purged or pushed out
├── JobNotEnded          (TimeoutError)     the job is still waiting or running when the caller's patience ends
├── IdempotencyConflict                     the key was used before, for another job
├── QueueUnavailable     (ConnectionError)  Redis cannot be reached, or refuses
└── UploadFailed         (ConnectionError)  a medium could not be put where KEYE_UPLOAD_PREFIX says; nothing was queued
InvalidJob               (ValueError)       from `keye.config.wire`: the job does not fit the schema; all faults listed
JobFailed                                   from `keye.config.outcome`: carries the `JobFailure`
"""

from redis.exceptions import OutOfMemoryError

from keye.config.outcome import JobState
from keye.config.quarantine import MAX_MESSAGES
from keye.config.wire import InvalidJob


class KeyeError(Exception):
    """Root of the errors that are the producer's own."""


class JobNotFound(KeyeError, LookupError):
    def __init__(self, job_id: str) -> None:
        super().__init__(
            f"There is no job {job_id!r}: it was never sent to this Redis, or its outcome has expired "
            "(KEYE_RESULT_TTL_SECONDS after its end)."
        )


class DeadLetterNotFound(KeyeError, LookupError):
    def __init__(self, job_id: str) -> None:
        super().__init__(
            f"Job {job_id!r} is not among the dead letters: it is unknown or did not fail, or its letter was requeued, "
            "purged, or is older than KEYE_DEAD_LETTER_TTL_SECONDS."
        )


class MessageNotFound(KeyeError, LookupError):
    def __init__(self, message_id: str) -> None:
        super().__init__(
            f"There is no message {message_id!r} in quarantine: it never was there, or it was purged, or pushed out by "
            f"newer ones (the newest {MAX_MESSAGES:,} stay)."
        )


class JobNotEnded(KeyeError, TimeoutError):
    def __init__(self, job_id: str, state: JobState, when: str, why: str | None = None) -> None:
        why = why or ("Is a worker running?" if state is JobState.QUEUED else "It goes on; wait again or cancel it.")
        super().__init__(f"Job {job_id} is {state} {when}. {why}")
        self.state = state


class IdempotencyConflict(KeyeError):
    """It does not say whose the key is: who finds out another's key should not get at his job by it."""

    def __init__(self, key: str) -> None:
        super().__init__(
            f"The idempotency key {key!r} belongs to a job that asks for something else. "
            "Send the same job again, or use another key."
        )


class QueueUnavailable(KeyeError, ConnectionError):
    def __init__(self, action: str, cause: Exception) -> None:
        remedy = "Check KEYE_REDIS_URL and that the server runs."
        if isinstance(cause, OutOfMemoryError):
            remedy = "It is full: give it more memory, or keep results for less long (KEYE_RESULT_TTL_SECONDS)."
        super().__init__(f"Redis could not {action} ({str(cause).rstrip('.')}). {remedy}")


class UploadFailed(KeyeError, ConnectionError):
    def __init__(self, index: int, prefix: str, reason: str) -> None:
        super().__init__(
            f"media.{index} could not be uploaded to {prefix} ({reason}). Check KEYE_UPLOAD_PREFIX, "
            "KEYE_S3_ENDPOINT_URL and the credentials, or upload it yourself and give its URI."
        )


# Why a job was not accepted.
Refusal = InvalidJob | UploadFailed | IdempotencyConflict | QueueUnavailable
