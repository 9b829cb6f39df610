"""Every error comes out of pickle, a copy or Celery's results as it went in, and is called by its public name."""

import copy
import json
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from celery.backends.base import Backend

import keye
from keye.config.codes import ErrorCode, JobState, Stage
from keye.config.connection import ArgumentTooLarge
from keye.config.faults import (
    DeadLetterNotFound,
    Fault,
    FeedGap,
    IdempotencyConflict,
    InvalidBatch,
    InvalidEventId,
    InvalidJob,
    InvalidSettings,
    JobFailed,
    JobNotEnded,
    JobNotFound,
    JobUnreadable,
    KeyeError,
    MessageNotFound,
    OutputUnwritable,
    QueueFull,
    QueueUnavailable,
    Refusal,
    UnknownSchemaVersion,
    UploadFailed,
)
from keye.config.outcome import (
    JobFailure,
    JobResult,
    ModelIdentity,
    PartialText,
    StageTimings,
    TokenUsage,
    WorkerIdentity,
)
from keye.worker.media.faults import MediumFault
from keye.worker.results.settlement import OutcomeTooLarge

FAILURE = JobFailure(
    job_id="7", code=ErrorCode.MEDIA_CORRUPT, message="It broke.", stage=Stage.DECODE, retryable=False, attempts=1
)
RESULT = JobResult(
    job_id="7",
    answer="a red square",
    reasoning=None,
    raw_text="a red square",
    finish_reason="stop",
    usage=TokenUsage(prompt_tokens=9, visual_tokens=4, completion_tokens=3),
    timings=StageTimings(total=0.5),
    media=(),
    model=ModelIdentity(name="keye", model_type="KeyeVL1_5", precision="float32"),
    worker=WorkerIdentity(host="here", pid=1, device="cpu"),
    attempts=1,
)
WRITTEN = PartialText(answer="a red", reasoning=None, raw_text="a red", completion_tokens=2)
EXAMPLES = [
    KeyeError("it broke"),
    Refusal("not accepted"),
    InvalidJob("1 fault: prompt: is empty"),
    UploadFailed("media.3 could not be uploaded to s3://uploads (NoSuchBucket)."),
    InvalidBatch("in.jsonl cannot be read: it is no file."),
    OutputUnwritable("out.jsonl cannot be written: No space left on device."),
    IdempotencyConflict("The idempotency key 'order 7' belongs to another job."),
    QueueFull("100 jobs are queued, the limit is 100.", 2.5),
    QueueUnavailable("Redis could not queue the job."),
    JobFailed.of(FAILURE),
    JobNotEnded.of("7", JobState.RUNNING, "after 5 s of waiting"),
    JobNotFound.of("7"),
    JobUnreadable.of("7", "outcome"),
    DeadLetterNotFound("Job '7' is not among the dead letters."),
    FeedGap.of("1-0", "7-0", 3),
    InvalidEventId("'x' is no id of an event."),
    MessageNotFound("There is no message '7-0' in quarantine."),
    UnknownSchemaVersion("The job has schema version 2, this release reads up to 1.", True),
    InvalidSettings("KEYE_REDIS_URL: is no URL"),
    Fault(ErrorCode.MEDIA_UNREACHABLE, "answered 503", 2, WRITTEN, retry_after_seconds=0.3),
    MediumFault(ErrorCode.MEDIA_CORRUPT, "is empty (0 bytes)."),
    OutcomeTooLarge.of(RESULT, ArgumentTooLarge("1,201,024 bytes in one piece")),
]
OF_CALLERS = [error for error in EXAMPLES if isinstance(error, KeyeError)]


def family(root: type[BaseException]) -> Iterator[type[BaseException]]:
    yield root
    for child in root.__subclasses__():
        yield from family(child)


def facts(error: BaseException) -> Any:
    return type(error), str(error), error.args, vars(error)


def name(error: BaseException) -> str:
    return type(error).__name__


def test_every_error_is_tried_here() -> None:
    assert {type(error) for error in EXAMPLES} == {*family(KeyeError), *family(Fault)}


@pytest.mark.holds("docs/producers.md#what-can-be-raised", "All that can be raised is a `KeyeError`")
@pytest.mark.parametrize("error", EXAMPLES, ids=name)
def test_an_error_survives_pickle_and_copies(error: Exception) -> None:
    assert str(error)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert facts(pickle.loads(pickle.dumps(error, protocol))) == facts(error)
    assert facts(copy.copy(error)) == facts(error)
    assert facts(copy.deepcopy(error)) == facts(error)


@pytest.mark.parametrize("error", OF_CALLERS, ids=name)
def test_an_error_that_a_callers_own_celery_task_raises_survives_its_result(error: KeyeError) -> None:
    backend = Backend(app=Celery(set_as_current=False))
    written = json.loads(json.dumps(backend.prepare_exception(error, serializer="json")))
    read = backend.exception_to_python(written)
    assert (type(read), str(read), vars(read)) == (type(error), str(error), vars(error))


@pytest.mark.holds("docs/producers.md#what-can-be-raised", "is imported from `keye`")
@pytest.mark.parametrize("error", OF_CALLERS, ids=name)
def test_an_error_is_from_keye_by_name(error: KeyeError) -> None:
    assert type(error).__module__ == "keye"
    assert getattr(keye, type(error).__name__) is type(error)


def test_an_error_of_a_callers_own_keeps_its_module() -> None:
    class OrderNotFound(keye.JobNotFound):
        pass

    assert OrderNotFound.__module__ == __name__


@pytest.mark.holds("docs/producers.md#what-can-be-raised", "raised | when")
@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (InvalidJob, ValueError),
        (UnknownSchemaVersion, ValueError),
        (InvalidSettings, ValueError),
        (JobNotFound, LookupError),
        (JobUnreadable, ValueError),
        (DeadLetterNotFound, LookupError),
        (MessageNotFound, LookupError),
        (JobNotEnded, TimeoutError),
        (QueueUnavailable, ConnectionError),
        (UploadFailed, ConnectionError),
    ],
)
def test_an_error_is_also_what_python_calls_it(error: type[Exception], kind: type[Exception]) -> None:
    assert issubclass(error, kind)


@pytest.mark.holds("docs/producers.md#from-python", "That error is a `Refusal` and may be asked like a job")
def test_a_refusal_says_why_from_each_verb_of_a_job() -> None:
    refusal = InvalidJob("1 fault: prompt: is empty")
    assert refusal.id is None
    assert refusal.error is refusal
    for verb in (refusal.result, refusal.events, refusal.cancel, lambda: refusal.state):
        for _ in range(2):
            with pytest.raises(InvalidJob, match="is empty") as raised:
                verb()
            assert raised.value is refusal
    # Frames of who asked before are not kept alive.
    assert len(raised.traceback) <= 4
