"""What can go wrong: what a caller meets is a `KeyeError`, what ends a job inside its worker a `Fault`.

KeyeError
├── Refusal
│   ├── InvalidJob           (ValueError)
│   ├── UploadFailed         (ConnectionError)
│   ├── IdempotencyConflict
│   ├── QueueFull
│   └── QueueUnavailable     (ConnectionError)
├── JobFailed
├── JobNotEnded          (TimeoutError)
├── JobNotFound          (LookupError)
├── JobUnreadable        (ValueError)
├── DeadLetterNotFound   (LookupError)
├── MessageNotFound      (LookupError)
├── FeedGap              (LookupError)
├── InvalidEventId       (ValueError)
├── InvalidBatch         (ValueError)
├── OutputUnwritable     (OSError)
├── UnknownSchemaVersion (ValueError)
└── InvalidSettings      (ValueError)
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NoReturn, Self

from keye.config.codes import ErrorCode, JobState

if TYPE_CHECKING:
    # The engine raises faults, and runs where there is no pydantic.
    from keye.config.outcome import JobFailure, PartialText


def install_command(extra: Literal["worker", "upload", "heic", "quantised", "decoders"]) -> str:
    """What a sentence about a missing package ends with."""
    return f"pip install 'keye-worker[{extra}]'"


class KeyeError(Exception):
    """Root of all that a caller can meet. The first of its arguments, all of them plain, says what happened.

    pickle, `copy` and Celery's results make an error anew from its arguments, so none takes others to be made.
    """

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class Refusal(KeyeError):
    """Why a job was not accepted. `Client.submit_many` puts it in the job's place: a `Job`'s verbs raise it."""

    id: None = None

    @property
    def error(self) -> Self:
        return self

    def result(self, timeout: float | None = None) -> NoReturn:
        # Where it was raised before is no news to who raises it now, and would keep alive what was in those frames.
        raise self.with_traceback(None)

    events = cancel = result

    @property
    def state(self) -> NoReturn:
        self.result()

    progress = state


class InvalidJob(Refusal, ValueError):
    """The job does not fit the schema; the message lists every fault."""


class UploadFailed(Refusal, ConnectionError):
    """A medium could not be put where KEYE_UPLOAD_PREFIX says."""


class IdempotencyConflict(Refusal):
    """The key was used before, for another job.

    It does not say whose the key is: who finds out another's key should not get at his job by it.
    """


class QueueFull(Refusal):
    """As many jobs are queued as KEYE_MAX_QUEUE_DEPTH allows; in `retry_after_seconds` another is likely to fit."""

    def __init__(self, message: str, retry_after_seconds: float) -> None:
        super().__init__(message, retry_after_seconds)
        self.retry_after_seconds = retry_after_seconds


class QueueUnavailable(Refusal, ConnectionError):
    """Redis is away, is full, or refuses; not only new jobs."""


class JobFailed(KeyeError):
    """The job ended without an answer. Raised by `Job.result`; also what a plain Celery `AsyncResult.get` raises."""

    def __init__(self, code: str, message: str, failure_json: str) -> None:
        super().__init__(code, message, failure_json)
        self.code = ErrorCode(code)

    @classmethod
    def of(cls, failure: "JobFailure") -> Self:
        return cls(failure.code.value, failure.message, failure.model_dump_json())

    @property
    def failure(self) -> "JobFailure":
        from keye.config.outcome import JobFailure

        return JobFailure.model_validate_json(self.args[2])

    def __str__(self) -> str:
        return f"{self.code}: {self.args[1]}"


class JobNotEnded(KeyeError, TimeoutError):
    """The job is still waiting or running, as `state` says, when the caller's patience ends."""

    def __init__(self, message: str, state: str) -> None:
        super().__init__(message)
        # Set here: `TimeoutError` would take two of them for an errno and its meaning.
        self.args = (message, state)
        self.state = JobState(state)

    @classmethod
    def of(cls, job_id: str, state: JobState, when: str, why: str | None = None) -> Self:
        why = why or ("Is a worker running?" if state is JobState.QUEUED else "It goes on; wait again or cancel it.")
        return cls(f"Job {job_id} is {state} {when}. {why}", state.value)


class JobNotFound(KeyeError, LookupError):
    """No record under this id."""

    @classmethod
    def of(cls, job_id: str) -> Self:
        return cls(
            f"There is no job {job_id!r}: it was never sent to this Redis, was purged, or ended longer ago than it is "
            "kept (its result_ttl_seconds, else KEYE_RESULT_TTL_SECONDS, where it failed KEYE_DEAD_LETTER_TTL_SECONDS "
            "if longer)."
        )


class JobUnreadable(KeyeError, ValueError):
    """What Redis holds of the job is nothing that this release can read."""

    @classmethod
    def of(cls, job_id: str, what: str) -> Self:
        return cls(
            f"The {what} of job {job_id!r} is nothing that this release can read: a newer one wrote it, or a stranger. "
            f"Upgrade, or look at it: HGETALL keye:job:{job_id}"
        )


class DeadLetterNotFound(KeyeError, LookupError):
    """The job is unknown or did not fail, or its dead letter is gone."""


class MessageNotFound(KeyeError, LookupError):
    """No such message in quarantine: it never was, or it was purged or pushed out."""


class FeedGap(KeyeError, LookupError):
    """Some of what followed the given id is no longer in the feed of ended jobs.

    `num_missing` is how many: exactly where the reader had read since the newest or the first, else at the most; None
    where the server, older than 7.0, does not tell.
    """

    def __init__(self, message: str, num_missing: int | None) -> None:
        super().__init__(message, num_missing)
        self.num_missing = num_missing

    @classmethod
    def of(cls, after: str, oldest: str, num_missing: int | None) -> Self:
        missing = "all" if num_missing is None else f"up to {num_missing} of the jobs"
        return cls(
            f"The feed of ended jobs no longer holds {missing} that came after {after}, it begins with {oldest}. Read "
            "how your open jobs ended (`client.results`), and watch from the newest on, or from '0' all that is there.",
            num_missing,
        )


class InvalidEventId(KeyeError, ValueError):
    """No event has such an id."""


class InvalidBatch(KeyeError, ValueError):
    """The input or the output of a batch cannot be used, or not together; no line of it is to blame."""


class OutputUnwritable(KeyeError, OSError):
    """The disk takes no more of what a batch writes, or none of it. Asked for again, with room, it goes on."""


class UnknownSchemaVersion(KeyeError, ValueError):
    """The payload says a schema version that this release does not read; `is_newer` where a later one may."""

    def __init__(self, message: str, is_newer: bool) -> None:
        super().__init__(message, is_newer)
        self.is_newer = is_newer


class InvalidSettings(KeyeError, ValueError):
    """Every setting that is wrong, by the name an operator knows it by. Values are left out: some are secrets."""


# Tracebacks, pickles and Celery's results name the place that stays.
for _error in [each for each in vars().values() if isinstance(each, type) and issubclass(each, KeyeError)]:
    _error.__module__ = "keye"


@dataclass(eq=False, repr=False)
class Fault(Exception):
    """A job cannot be answered, and it is known why: the code and the sentence that its caller will read.

    `message` never holds query strings, signed URLs or credentials. `media_index` is the medium to blame, counted as in
    `AnalysisJob.all_media`, `partial` what was written of an answer, `retry_after_seconds` how long a store asked to be
    left alone.
    """

    code: ErrorCode
    message: str
    media_index: int | None = None
    partial: "PartialText | None" = None
    retry_after_seconds: float | None = None

    def __str__(self) -> str:
        return self.message


class MediumFault(Fault):
    """Its sentence lacks the subject, the medium, whose name only the worker's `named` knows: "is empty (0 bytes)."

    One raised from an error of a decoder's library is logged with its traceback. Fetches raise from none: theirs hold
    signed URLs.
    """
